"""The engine behind an event loop: submit, stream, abort, refuse, drain."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sortserve.core.budget import Budget, OnMiss
from sortserve.core.errors import (
    BudgetUnattainableError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from sortserve.core.plan import StepPlan
from sortserve.core.request import RequestOutput
from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, RowShape, StepShape
from sortserve.engine.worker import EngineWorker
from support.scripted import FakeClock, ScriptedRunner, make_engine, make_request


class GatedRunner(ScriptedRunner):
    """A runner that waits for permission before every step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.permits = threading.Semaphore(0)

    def execute(self, plan: StepPlan) -> list[Any]:
        assert self.permits.acquire(timeout=30)
        return super().execute(plan)


@pytest.fixture
async def worker() -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(make_engine())
    worker.start()
    yield worker
    await asyncio.to_thread(worker.stop)


async def text_of(worker: EngineWorker, request_id: str, **kwargs: Any) -> str:
    stream = worker.submit(make_request(request_id, **kwargs))
    return "".join([output.text async for output in stream])


async def test_concurrent_requests_each_get_their_own_text(worker: EngineWorker) -> None:
    prompts = [chr(ord("a") + i % 20) for i in range(50)]

    texts = await asyncio.gather(
        *(text_of(worker, str(i), prompt=prompt) for i, prompt in enumerate(prompts))
    )

    assert texts == ["".join(chr(ord(p) + k) for k in range(1, 5)) for p in prompts]


async def test_an_abort_ends_the_stream_and_frees_the_pages() -> None:
    runner = GatedRunner()
    worker = EngineWorker(make_engine(runner=runner))
    worker.start()
    stream = worker.submit(make_request("r", max_tokens=100))
    runner.permits.release()
    outputs = aiter(stream)
    first = await anext(outputs)

    stream.abort()
    runner.permits.release()  # the step under way, if any
    last = [output async for output in outputs][-1]

    assert first.text == "b"
    assert last.finish_reason == "abort"
    assert worker.stats().kv_pages_used == 0
    assert len(runner.plans) <= 2
    await asyncio.to_thread(worker.stop)


async def test_a_worker_that_has_not_started_refuses_work() -> None:
    worker = EngineWorker(make_engine())

    with pytest.raises(UnavailableError, match="loading"):
        worker.submit(make_request())


async def test_the_queue_caps_refuse_before_anything_runs() -> None:
    runner = GatedRunner()
    worker = EngineWorker(make_engine(runner=runner), max_num_queued_reqs=2)
    worker.start()
    streams = [worker.submit(make_request(str(i), max_tokens=1)) for i in range(2)]

    with pytest.raises(OverloadedError, match="2 may") as error:
        worker.reserve(1, 10)

    assert error.value.retry_after_s is not None
    for _ in range(4):
        runner.permits.release()
    for stream in streams:
        assert [output async for output in stream]
    worker.reserve(1, 10).release()
    await asyncio.to_thread(worker.stop)


async def test_queued_tokens_are_capped_but_an_empty_queue_takes_any_prompt() -> None:
    worker = EngineWorker(make_engine(runner=GatedRunner()), max_num_queued_tokens=100)
    worker.start()

    reservation = worker.reserve(1, 500)
    with pytest.raises(OverloadedError, match="prompt tokens"):
        worker.reserve(1, 10)
    reservation.release()
    worker.reserve(1, 10).release()

    await asyncio.to_thread(worker.stop)


async def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    runner = GatedRunner()
    worker = EngineWorker(make_engine(runner=runner))
    worker.start()
    stream = worker.submit(make_request("r", max_tokens=4))

    drained = asyncio.create_task(worker.drain(timeout_s=1e9))
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match="draining"):
        worker.submit(make_request("late"))
    for _ in range(8):
        runner.permits.release()
    text = "".join([output.text async for output in stream])

    assert text == "bcde"
    assert await drained
    assert worker.state == "stopped"


async def test_a_drain_that_times_out_aborts_the_rest_with_a_proper_end() -> None:
    runner = GatedRunner()
    worker = EngineWorker(make_engine(runner=runner))
    worker.start()
    stream = worker.submit(make_request("r", max_tokens=200))
    runner.permits.release()
    outputs = aiter(stream)
    texts = [(await anext(outputs)).text]

    drained = asyncio.create_task(worker.drain(timeout_s=-1.0))
    await asyncio.to_thread(worker._stopping.wait, 30)
    runner.permits.release()  # the step under way
    async for output in outputs:
        texts.append(output.text)
        last = output

    assert "".join(texts) == "bc"
    assert last.finish_reason == "abort"
    assert last.report is not None
    assert last.report.num_output_tokens == 2
    assert not await drained
    assert worker.stats().kv_pages_used == 0


async def test_an_engine_that_breaks_answers_everyone_and_takes_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    worker = EngineWorker(engine)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    worker.start()

    stream = worker.submit(make_request())
    with pytest.raises(EngineError):
        _ = [output async for output in stream]

    assert worker.state == "failed"
    with pytest.raises(UnavailableError, match="failed"):
        worker.submit(make_request("next"))


async def test_outputs_that_are_here_already_can_be_taken_without_waiting(
    worker: EngineWorker,
) -> None:
    stream = worker.submit(make_request("r", max_tokens=5))
    outputs = aiter(stream)
    first = await anext(outputs)

    rest = stream.take_ready()
    async for output in outputs:
        rest.append(output)

    assert first.text + "".join(output.text for output in rest) == "bcdef"


async def test_a_budget_without_a_limit_is_planned_for_the_expected_tokens() -> None:
    engine = make_engine(exits=(2, 6))
    line = (0.0, 1e-3, 0.0, 0.0, 0.0)  # a millisecond a layer
    engine.costs.use(CostModel(line, line))
    worker = EngineWorker(engine)
    worker.start()
    budget = Budget(latency_ms=500)

    planned, unplanned = (
        dataclasses.replace(
            make_request(name, max_tokens=200, budget=budget), expected_tokens=expected
        )
        for name, expected in (("planned", 10), ("unplanned", None))
    )
    reports = [
        [output async for output in worker.submit(request)][-1].report
        for request in (planned, unplanned)
    ]

    assert [report.exit_layer for report in reports if report is not None] == [6, 2]
    await asyncio.to_thread(worker.stop)


async def test_a_request_that_the_queue_can_never_hold_is_an_invalid_one() -> None:
    worker = EngineWorker(make_engine(), max_num_queued_reqs=2)
    worker.start()

    with pytest.raises(InvalidRequestError, match="3 sequences") as error:
        worker.reserve(3, 10)

    assert error.value.param == "n"
    await asyncio.to_thread(worker.stop)


async def test_outputs_before_an_error_are_not_lost() -> None:
    runner = GatedRunner()
    worker = EngineWorker(make_engine(runner=runner))
    worker.start()
    stream = worker.submit(make_request("r", max_tokens=9))
    runner.permits.release()
    first = await anext(aiter(stream))
    stream.deliver(RequestOutput(request_id="r", text="c"))
    stream.deliver(RequestOutput(request_id="r", error=EngineError("broken")))

    taken = stream.take_ready()
    with pytest.raises(EngineError):
        stream.take_ready()

    assert first.text + "".join(output.text for output in taken) == "bc"
    for _ in range(20):
        runner.permits.release()
    await asyncio.to_thread(worker.stop)


async def test_preparing_runs_on_the_engines_thread_before_the_first_request() -> None:
    worker = EngineWorker(make_engine())
    seen: list[tuple[str, str]] = []

    worker.start(lambda: seen.append((threading.current_thread().name, worker.state)))

    assert seen == [("engine", "loading")]
    assert worker.state == "ready"
    await asyncio.to_thread(worker.stop)


async def test_a_failure_while_preparing_is_raised_where_the_worker_is_started() -> None:
    worker = EngineWorker(make_engine())

    with pytest.raises(ZeroDivisionError):
        worker.start(lambda: 1 / 0)  # type: ignore[arg-type]

    assert worker.state == "loading"
    await asyncio.to_thread(worker.stop)


class ProbeObserver:
    """Sets an event at the third probe step."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.probed = threading.Event()

    def on_step(self, record: object) -> None:
        """Not asked for here."""

    def on_finished(self, report: object) -> None:
        """Not asked for here."""

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """Not asked for here."""

    def on_forecast_failed(self) -> None:
        """Not asked for here."""

    def on_probe_step(self) -> None:
        self.num_steps += 1
        if self.num_steps == 3:
            self.probed.set()


async def test_while_all_are_refused_the_idle_engine_probes_and_serves_the_next_one() -> None:
    observer, runner = ProbeObserver(), ScriptedRunner()
    engine = make_engine(runner=runner, clock=FakeClock(tick=0.02), observer=observer)
    shapes = [StepShape.of([RowShape(6, n, n, samples=True)]) for n in (1, 8, 64, 256)]
    engine.costs.learn_from(CostLearner([(shape, 0.1) for shape in shapes]))
    worker = EngineWorker(engine, debug=True)
    worker.start()
    assert not observer.probed.is_set()

    with pytest.raises(BudgetUnattainableError):
        worker.submit(make_request("late", budget=Budget(ttft_ms=1, on_miss=OnMiss.REJECT)))
    probed = await asyncio.to_thread(observer.probed.wait, 30)
    text = await text_of(worker, "next")

    assert probed
    assert text == "bcde"
    assert {row.request_id for row in runner.plans[0].rows} == {"probe"}
    await asyncio.to_thread(worker.stop)
    assert worker.failure is None
    engine.check_invariants()
    assert engine.kv_cache.pool.num_used == 0
