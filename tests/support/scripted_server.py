"""``sortserve serve`` over a scripted engine, which misbehaves as told: a process of its own.

    python -m support.scripted_server FAULT [FLAG ...]

All is the real thing but ``build``, so that a process starts in a second and hangs where a test
wants it to. Waits that only a hung process lasts out are cut short where one hangs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import uvicorn

import sortserve
from sortserve import cli
from sortserve.core.plan import StepPlan
from sortserve.core.request import EngineStats, RequestOutput
from sortserve.core.sampling_params import SampledToken
from sortserve.engine import worker as worker_module
from sortserve.engine.worker import EngineWorker
from sortserve.process import http_server, serve
from sortserve.process.config import ServeSettings
from sortserve.telemetry.metrics import Metrics
from sortserve.telemetry.totals import Totals
from support.http_service import EXITS, AsciiTokenizer
from support.scripted import ScriptedRunner, make_engine

logger = logging.getLogger("sortserve.test")

MAX_MODEL_LEN = 2048
"""Enough for an answer that is larger than what the system holds for a client."""


def hang() -> None:
    threading.Event().wait()


class HangingRunner(ScriptedRunner):
    def execute(self, plan: StepPlan) -> list[SampledToken]:
        logger.info("the step hangs")
        hang()
        raise AssertionError


class SlowRunner(ScriptedRunner):
    def execute(self, plan: StepPlan) -> list[SampledToken]:
        time.sleep(0.005)
        return super().execute(plan)


def fail_step() -> list[RequestOutput]:
    raise RuntimeError("broken")


def block_loop() -> EngineStats:
    time.sleep(1e6)
    raise AssertionError


def chatter() -> None:
    """More than a pipe holds."""
    for number in range(3000):
        logger.info("line %d %s", number, "x" * 100)


def hang_loudly() -> None:
    logger.info("calibration hangs")
    hang()


async def fail_tick(self: uvicorn.Server, counter: int) -> bool:
    if counter > 2:
        raise RuntimeError("the accept loop broke")
    return False


def build(settings: ServeSettings) -> Any:
    fault = FAULT
    if fault == "load hangs":
        logger.info("loading hangs")
        hang()
    runner = {"step hangs": HangingRunner}.get(fault, SlowRunner)(num_pages=1 << 15)
    engine = make_engine(
        exits=EXITS, runner=runner, clock=time.monotonic, max_model_len=MAX_MODEL_LEN
    )
    worker = EngineWorker(engine)
    prepare: Callable[[], None] = {"calibration hangs": hang_loudly, "chatter": chatter}.get(
        fault, lambda: None
    )
    if fault == "engine fails":
        engine.step = fail_step  # type: ignore[method-assign]
    if fault == "loop blocked":
        worker.stats = block_loop  # type: ignore[method-assign]
    if fault == "http fails":
        uvicorn.Server.on_tick = fail_tick  # type: ignore[method-assign]
    return SimpleNamespace(
        model_name="tiny",
        license=None,
        exits=worker.exits,
        generation_defaults={},
        tokenizer=AsciiTokenizer(),
        worker=worker,
        prepare=prepare,
        close=lambda: None,
        metrics=Metrics("tiny", EXITS, version=sortserve.__version__),
        totals=Totals(),
        tracing=None,
        cache=SimpleNamespace(num_pages=1, num_bytes=1, block_size=4, slab_size=2),
        computed_in={
            name: "scripted" for name in ("dtype", "quantization", "backend", "isa", "threads")
        },
    )


def stuck_in_executor() -> None:
    """A thread of the event loop's own pool that never comes back."""
    asyncio.get_running_loop().run_in_executor(None, hang)


if __name__ == "__main__":
    FAULT, *flags = sys.argv[1:]
    module = ModuleType("sortserve.process.build")
    module.build = build  # type: ignore[attr-defined]
    sys.modules["sortserve.process.build"] = module
    if "hangs" in FAULT or "blocked" in FAULT:
        worker_module.STOP_TIMEOUT_S = 0.3
        serve.MAX_END_S = 1.0
        serve.STEP_END_S = 0.3
        serve.MAX_FORCED_END_S = 0.6
        http_server.LAST_EVENTS_S = 1
    if FAULT == "no time after the end":
        http_server.LAST_EVENTS_S = 0
    if FAULT == "pool hangs":
        announce = serve.ServerProcess._announce

        def announce_and_hang(self: Any, *arguments: Any) -> None:
            stuck_in_executor()
            announce(self, *arguments)

        serve.ServerProcess._announce = announce_and_hang  # type: ignore[method-assign,assignment]
    sys.exit(cli.main(["serve", *flags]))
