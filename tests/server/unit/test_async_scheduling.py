"""Who overlaps its steps: what ``--async-scheduling`` says, and otherwise a GPU."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import SampledToken
from sortserve.engine.assemble import EngineOptions, assemble
from sortserve.engine.step_thread import StepThread
from sortserve.engine.worker import EngineWorker
from sortserve.process.config import load_settings
from sortserve.simulation import BlankRunner, Clock, Simulation
from support.launchers import LAUNCHERS
from support.scripted import ScriptedRunner, add, make_engine, make_request, run
from support.timed import MODEL, TimedLauncher, timed_request
from support.tiny_models import make_tiny_checkpoint

TIMEOUT_S = 20.0


@pytest.mark.parametrize("chosen", [None, False, True])
def test_on_a_cpu_steps_overlap_only_where_that_is_asked_for(
    chosen: bool | None, tmp_path: Path
) -> None:
    path = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 4, 6))
    checkpoint = load_checkpoint(str(path), dtype="float32", device="cpu")
    options = EngineOptions(async_scheduling=chosen, kv_cache_memory=1 << 20, max_model_len=64)

    parts = assemble(checkpoint, options)
    parts.calibrate()

    assert parts.engine.config.async_scheduling is bool(chosen)
    assert isinstance(parts.engine.runner, StepThread) is bool(chosen)
    add(parts.engine, make_request("r", [5, 6, 7], max_tokens=9, temperature=0.0, ignore_eos=True))
    assert len(run(parts.engine)["r"].token_ids) == 9


@pytest.mark.parametrize(
    ("flags", "value"),
    [({}, None), ({"async_scheduling": "auto"}, None), ({"async_scheduling": "false"}, False)],
)
def test_the_setting_is_on_off_or_auto(flags: dict[str, str], value: bool | None) -> None:
    assert load_settings(flags).async_scheduling is value


@pytest.mark.parametrize("overlap", [False, True])
def test_what_an_answer_can_spare_is_spent_once_whether_steps_overlap_or_not(overlap: bool) -> None:
    """A step that is planned while another is under way begins when that one is over."""
    clock = Clock()
    runner = TimedLauncher(BlankRunner((2, 4, 6), num_pages=4000), clock, MODEL)
    config: dict[str, Any] = {"max_model_len": 8192, "async_scheduling": overlap}
    config["enable_prefix_caching"] = False
    engine = make_engine(runner=runner, clock=clock, **config)
    engine.costs.use(MODEL)
    simulation = Simulation(engine, clock)
    promised = timed_request("promised", 20, max_tokens=60, latency_ms=700, exit_layer=6)
    long = timed_request("long", 4000, max_tokens=4, at=0.05, exit_layer=6)

    simulation.run([promised, long])

    assert simulation.choices["promised"].fits
    assert simulation.reports["promised"].met


class Slow(ScriptedRunner):
    """Runs a step when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.go = threading.Event(), threading.Event()

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        self.started.set()
        assert self.go.wait(TIMEOUT_S)
        return super().execute(plan)


async def test_a_worker_that_stops_waits_for_the_step_under_way() -> None:
    runner = Slow()
    engine = make_engine(runner=LAUNCHERS["thread"](runner), async_scheduling=True)
    worker = EngineWorker(engine)
    worker.start()
    stream = worker.submit(make_request("r", "abc", max_tokens=50))
    assert await asyncio.to_thread(runner.started.wait, TIMEOUT_S)

    stopping = asyncio.create_task(asyncio.to_thread(worker.stop, TIMEOUT_S))
    runner.go.set()

    assert await stopping
    outputs = [output async for output in stream]
    assert outputs[-1].finish_reason == "abort"
    assert not engine.has_work
    assert engine.stats().kv_pages_used == 0
