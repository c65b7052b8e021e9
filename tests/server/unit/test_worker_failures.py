"""Whatever fails or hangs under the worker: every client gets an end, and health says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from sortserve.core.errors import EngineError, UnavailableError
from sortserve.engine.engine import Engine
from sortserve.engine.worker import EngineWorker, RequestStream
from sortserve.scheduling.kv_cache import KVCacheManager
from support.faults import Fault, FaultyRunner
from support.http_service import GatedRunner
from support.scripted import ScriptedRunner, make_engine, make_request
from support.watchdogs import HandWatchdog

WAIT_S = 20.0
"""How long a test waits for what should come at once."""
NUM_LIVE = 8
SHORT_S = 0.1


@asynccontextmanager
async def running(worker: EngineWorker) -> AsyncIterator[EngineWorker]:
    worker.start()
    try:
        yield worker
    finally:
        await asyncio.to_thread(worker.stop, WAIT_S)


async def outcome(stream: RequestStream) -> str:
    """The text of a stream, or what it ended with."""
    try:
        async with asyncio.timeout(WAIT_S):
            return "".join([output.text async for output in stream])
    except EngineError:
        return "error"


async def outcomes(streams: list[RequestStream]) -> list[str]:
    return await asyncio.gather(*map(outcome, streams))


def submit(worker: EngineWorker, count: int = NUM_LIVE, **options: Any) -> list[RequestStream]:
    return [worker.submit(make_request(f"r{i}", **options)) for i in range(count)]


def submit_till_it_fails(worker: EngineWorker, **options: Any) -> list[RequestStream]:
    """As many as are taken: a worker may have failed by the first of them."""
    streams = []
    for i in range(NUM_LIVE):
        with suppress(UnavailableError):
            streams.append(worker.submit(make_request(f"r{i}", **options)))
    assert streams
    return streams


# ---- every call of the engine ----


@pytest.mark.parametrize("name", ["step", "has_work", "check_health"])
@pytest.mark.parametrize("hangs", [False, True], ids=["raises", "hangs"])
async def test_an_engine_that_cannot_go_on_answers_everyone_and_takes_no_more(
    name: str, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = HandWatchdog(monkeypatch)
    engine = make_engine()
    if name == "has_work":
        fault = Fault(lambda: engine.scheduler.has_work)
        monkeypatch.setattr(Engine, name, property(lambda self: fault()))
    else:
        fault = Fault(getattr(engine, name))
        monkeypatch.setattr(engine, name, fault)
    async with running(EngineWorker(engine, step_timeout_s=SHORT_S)) as worker:
        fault.arm(hangs=hangs)
        streams = submit_till_it_fails(worker, max_tokens=50)
        if hangs:
            await watchdog.time_out(fault)

        assert await outcomes(streams) == ["error"] * len(streams)
        assert worker.state == "failed"
        assert worker.failure
        with pytest.raises(UnavailableError, match="failed"):
            worker.submit(make_request("next"))
        fault.disarm()


@pytest.mark.parametrize("name", ["stats", "demands"])
async def test_an_engine_that_cannot_be_looked_at_serves_on(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    worker = EngineWorker(engine)
    fault = Fault(getattr(engine, name))
    monkeypatch.setattr(engine, name, fault)
    async with running(worker):
        fault.arm()

        assert await outcomes(submit(worker)) == ["bcde"] * NUM_LIVE
        assert worker.state == "ready"
    assert caplog.text.count("cannot be seen") == 1


async def test_a_request_that_the_engine_cannot_take_ends_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    take = engine.add_request

    def faulty(request: Any, choice: Any) -> None:
        if request.request_id == "r3":
            raise RuntimeError("a scripted fault")
        take(request, choice)

    monkeypatch.setattr(engine, "add_request", faulty)
    async with running(EngineWorker(engine)) as worker:
        results = await outcomes(submit(worker))

        assert results == ["error" if i == 3 else "bcde" for i in range(NUM_LIVE)]
        worker.reserve(512, 1).release()  # its place in the queue is free again


async def test_an_abort_that_fails_ends_the_engine_but_nobody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = GatedRunner()
    runner.gated = True
    engine = make_engine(runner=runner)
    monkeypatch.setattr(engine, "abort", lambda request_id: 1 / 0)
    async with running(EngineWorker(engine)) as worker:
        streams = submit(worker)
        streams[0].abort()
        runner.open()

        assert set(await outcomes(streams)) == {"error"}


@pytest.mark.parametrize("part", ["schedule", "launch", "land", "finish", "add"])
async def test_a_scheduler_that_raises_leaves_nobody_waiting(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    fault = Fault(getattr(engine.scheduler, part))
    monkeypatch.setattr(engine.scheduler, part, fault)
    async with running(EngineWorker(engine)) as worker:
        fault.arm()
        streams = submit_till_it_fails(worker)

        assert await outcomes(streams) == ["error"] * len(streams)


@pytest.mark.parametrize("part", ["admit", "grow", "publish", "free"])
async def test_a_cache_that_raises_leaves_nobody_waiting(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCacheManager, part, lambda *args, **kwargs: 1 / 0)
    async with running(EngineWorker(make_engine())) as worker:
        results = await outcomes(submit_till_it_fails(worker))

        assert "error" in results
        assert worker.state == "failed"


async def test_a_failure_that_is_no_exception_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        raise SystemExit(3)

    engine = make_engine()
    monkeypatch.setattr(engine, "step", leave)
    async with running(EngineWorker(engine)) as worker:
        streams = submit_till_it_fails(worker)
        assert await outcomes(streams) == ["error"] * len(streams)


# ---- the model ----


async def test_a_model_that_raises_on_one_request_serves_the_others() -> None:
    async with running(EngineWorker(make_engine(runner=FaultyRunner(guilty=["r5"])))) as worker:
        results = await outcomes(submit(worker))

        assert results == ["error" if i == 5 else "bcde" for i in range(NUM_LIVE)]
        assert worker.state == "ready"


async def test_a_model_that_always_raises_ends_the_engine() -> None:
    runner = FaultyRunner()
    async with running(EngineWorker(make_engine(runner=runner, max_failed_steps=2))) as worker:
        runner.is_broken = True

        assert await outcomes(submit(worker, 1)) == ["error"]
        assert await outcomes(submit(worker, 1)) == ["error"]
        async with asyncio.timeout(WAIT_S):
            while worker.state != "failed":
                await asyncio.sleep(0.01)
        assert worker.failure == "2 steps in a row failed, self-tests included"


async def test_a_step_that_hangs_is_found_and_who_waits_is_answered() -> None:
    runner = ScriptedRunner()
    fault = Fault(runner.execute)
    runner.execute = fault  # type: ignore[method-assign]
    async with running(EngineWorker(make_engine(runner=runner), step_timeout_s=SHORT_S)) as worker:
        fault.arm(hangs=True)

        assert await outcomes(submit(worker, 1)) == ["error"]  # a second might come too late
        assert worker.state == "failed"
        assert "has not got on for 0.1 s" in (worker.failure or "")
        fault.disarm()


async def test_a_step_that_ends_after_it_was_given_up_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watchdog = HandWatchdog(monkeypatch)
    runner = ScriptedRunner()
    fault = Fault(runner.execute)
    runner.execute = fault  # type: ignore[method-assign]
    worker = EngineWorker(make_engine(runner=runner), step_timeout_s=SHORT_S)
    worker.start()
    fault.arm(hangs=True)
    streams = submit(worker)
    await watchdog.time_out(fault)
    assert await outcomes(streams) == ["error"] * NUM_LIVE

    fault.disarm()

    assert await asyncio.to_thread(worker.stop, WAIT_S)  # the thread has ended by itself
    assert worker.state == "failed"
    assert all(not stream.take_ready() for stream in streams)


async def test_an_idle_engine_never_counts_as_one_that_hangs() -> None:
    async with running(EngineWorker(make_engine(), step_timeout_s=SHORT_S)) as worker:
        await asyncio.sleep(3 * SHORT_S)

        assert worker.state == "ready"


# ---- the end ----


async def test_a_stop_does_not_wait_for_a_step_that_hangs() -> None:
    runner = ScriptedRunner()
    fault = Fault(runner.execute)
    runner.execute = fault  # type: ignore[method-assign]
    worker = EngineWorker(make_engine(runner=runner))
    worker.start()
    fault.arm(hangs=True)
    streams = submit(worker)
    assert await asyncio.to_thread(fault.struck.wait, WAIT_S)

    assert not await asyncio.to_thread(worker.stop, SHORT_S)

    assert await outcomes(streams) == ["error"] * NUM_LIVE
    fault.disarm()


async def test_a_drain_does_not_wait_for_a_step_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sortserve.engine.worker.STOP_TIMEOUT_S", SHORT_S)
    runner = ScriptedRunner()
    fault = Fault(runner.execute)
    runner.execute = fault  # type: ignore[method-assign]
    worker = EngineWorker(make_engine(runner=runner))
    worker.start()
    fault.arm(hangs=True)
    streams = submit(worker)

    async with asyncio.timeout(WAIT_S):
        assert not await worker.drain(timeout_s=-1.0)

    assert await outcomes(streams) == ["error"] * NUM_LIVE
    fault.disarm()


async def test_a_request_that_comes_while_the_engine_fails_is_refused_or_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state was looked at before the failure, the inbox is filled after it."""
    engine = make_engine()
    worker = EngineWorker(engine)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    async with running(worker):
        validate = engine.validate

        def fail_meanwhile(request: Any) -> tuple[int, ...]:
            if request.request_id == "late":
                worker.fail("a scripted fault")
            return validate(request)

        monkeypatch.setattr(engine, "validate", fail_meanwhile)

        with pytest.raises(UnavailableError, match="failed"):
            worker.submit(make_request("late"))


async def test_the_books_are_checked_whenever_the_engine_is_idle_under_debug() -> None:
    engine = make_engine()
    async with running(EngineWorker(engine, debug=True)) as worker:
        assert await outcomes(submit(worker)) == ["bcde"] * NUM_LIVE
        engine.kv_cache.pool.allocate(1)  # a page that nobody holds

        async with asyncio.timeout(WAIT_S):
            while worker.state != "failed":
                await asyncio.sleep(0.01)
        assert "AssertionError" in (worker.failure or "")


# ---- the streams ----


async def test_a_stream_that_cannot_take_an_output_ends_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deliver = RequestStream.deliver

    def faulty(stream: RequestStream, output: Any) -> None:
        if stream.request_id == "r2":
            raise RuntimeError("a scripted fault")
        deliver(stream, output)

    monkeypatch.setattr(RequestStream, "deliver", faulty)
    async with running(EngineWorker(make_engine())) as worker:
        results = await outcomes(submit(worker))

        assert results == ["error" if i == 2 else "bcde" for i in range(NUM_LIVE)]


async def test_a_closed_event_loop_harms_no_other() -> None:
    async with running(EngineWorker(make_engine())) as worker:

        def submit_and_leave() -> None:
            async def leave() -> None:
                worker.submit(make_request("left"))

            asyncio.run(leave())

        thread = threading.Thread(target=submit_and_leave)
        thread.start()
        await asyncio.to_thread(thread.join)

        assert await outcomes(submit(worker)) == ["bcde"] * NUM_LIVE
