"""A client that leaves takes its requests with it, within one step of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message

from sortserve.core.request import FinishReason
from sortserve.cost.model import CostModel
from support.http_service import WAIT_S, Connection, HttpService, as_json, parse_events
from support.scripted import FakeClock

LONG = {"prompt": "a", "max_tokens": 200}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", LONG),
    ("/generate", {**LONG, "n": 4}),
    ("/v1/completions", {**LONG, "prompt": ["a", "b", "c"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 200}),
]


def num_sequences(body: dict[str, Any]) -> int:
    return int(body.get("n", 1)) * (len(body["prompt"]) if "prompt" in body else 1)


async def finish(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(WAIT_S):
        await task


async def settle() -> None:
    """Let the event loop run everything that is ready."""
    for _ in range(20):
        await asyncio.sleep(0)


async def assert_aborted(service: HttpService, count: int, *, max_steps: int) -> None:
    """All requests were aborted, after at most so many steps, and left no page behind."""
    reports = await service.ended.wait_for(count)
    assert [report.finish_reason for report in reports] == [FinishReason.ABORT] * count
    assert len(service.runner.plans) <= max_steps
    await asyncio.to_thread(service.worker.stop)
    service.engine.check_invariants()
    assert service.worker.stats().kv_pages_used == 0


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_leaving_while_a_stream_runs_aborts_within_one_step(
    service: HttpService, path: str, body: dict[str, Any]
) -> None:
    service.runner.gated = True
    connection = Connection(service.app, path, as_json({**body, "stream": True}))
    task = connection.open()
    service.runner.permits.release()
    await connection.wait_for_events(1)

    connection.leave()
    await settle()
    service.runner.permits.release()  # the step that is under way
    await finish(task)

    await assert_aborted(service, num_sequences(body) if "prompt" in body else 1, max_steps=2)


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_leaving_while_waiting_for_a_whole_answer_aborts_within_one_step(
    service: HttpService, path: str, body: dict[str, Any]
) -> None:
    service.runner.gated = True
    connection = Connection(service.app, path, as_json(body))
    task = connection.open()
    await settle()

    connection.leave()
    await settle()
    service.runner.permits.release()  # the step that is under way
    await finish(task)

    await assert_aborted(service, num_sequences(body) if "prompt" in body else 1, max_steps=1)
    assert connection.messages == []


async def test_leaving_before_the_first_token_of_a_stream_sends_no_event(
    service: HttpService,
) -> None:
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "stream": True}))
    task = connection.open()
    await settle()

    connection.leave()
    await settle()
    service.runner.permits.release()
    await finish(task)

    assert [message["type"] for message in connection.messages] == ["http.response.start"]
    await assert_aborted(service, 1, max_steps=1)


async def test_a_send_that_fails_aborts_the_request(service: HttpService) -> None:
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "stream": True}))
    task = connection.open()
    service.runner.permits.release()
    await connection.wait_for_events(1)

    connection.send_fails = True
    service.runner.permits.release()
    await finish(task)
    service.runner.permits.release()  # the step that is under way

    await assert_aborted(service, 1, max_steps=3)


async def test_a_cancelled_request_is_aborted(service: HttpService) -> None:
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "n": 3, "stream": True}))
    task = connection.open()
    service.runner.permits.release()
    await connection.wait_for_events(1)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    service.runner.permits.release()

    await assert_aborted(service, 3, max_steps=2)


async def test_a_slow_client_holds_up_nobody_and_gets_what_waited_in_one_send(
    service: HttpService,
) -> None:
    may_send = asyncio.Event()

    async def hold(message: Message) -> None:
        if message.get("body"):
            await may_send.wait()

    body = {"prompt": "a", "max_tokens": 50, "stream": True}
    slow = Connection(service.app, "/generate", as_json(body), before_send=hold)
    task = slow.open()

    fast = await service.post("/generate", {"prompt": "b", "max_tokens": 60})
    await service.ended.wait_for(2)
    may_send.set()
    await finish(task)

    assert fast.json()["usage"]["completion_tokens"] == 60
    sends = [m for m in slow.messages if m.get("body")]
    assert slow.content.count(b"data: ") == 51
    assert len(sends) < 51


async def test_an_error_inside_a_stream_is_an_event_and_the_stream_ends(
    service: HttpService,
) -> None:
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "stream": True}))
    task = connection.open()
    service.runner.permits.release()
    await connection.wait_for_events(1)

    service.runner.fail_next = True
    service.runner.permits.release()
    await finish(task)

    *_, error, done, rest = connection.content.decode().split("\n\n")
    assert connection.status == 200
    assert error.startswith('data: {"error":{"message":"The model failed')
    assert (done, rest) == ("data: [DONE]", "")
    assert connection.messages[-1]["more_body"] is False


@pytest.mark.parametrize(
    ("path", "body"), [BODIES[0], BODIES[3], ("/v1/completions", {**LONG, "echo": True})]
)
async def test_a_failure_before_the_first_token_of_a_stream_is_its_only_event(
    service: HttpService, path: str, body: dict[str, Any]
) -> None:
    service.runner.fail_next = True

    [error] = await service.events(path, body)

    assert error["error"]["code"] == "engine_error"


async def test_the_headers_of_a_stream_do_not_wait_for_the_first_token(
    service: HttpService,
) -> None:
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "stream": True}))
    task = connection.open()
    await settle()

    assert connection.status == 200
    assert connection.content == b""

    service.runner.open()
    await finish(task)


async def test_what_refuses_a_stream_on_arrival_has_its_own_status(
    make: Callable[..., HttpService],
) -> None:
    body = {**LONG, "stream": True}
    line = (0.0, 1e-3, 0.0, 0.0, 0.0)
    service = make(worker_options={"max_num_queued_reqs": 1})
    service.engine.costs.use(CostModel(line, line))
    late = {"budget": {"latency_ms": 1, "on_miss": "reject"}}

    wrong = await service.post("/generate", {**body, "top_p": 2})
    too_long = await service.post("/generate", {**body, "prompt": "a" * 300})
    unattainable = await service.post("/generate", {**body, **late})
    with service.worker.reserve(1, 1):
        full = await service.post("/generate", body)
    await service.worker.drain(0)
    draining = await service.post("/generate", body)

    replies = (wrong, too_long, unattainable, full, draining)
    assert [reply.status_code for reply in replies] == [400, 400, 429, 429, 503]
    assert all(reply.json()["error"]["message"] for reply in replies)


async def test_a_budget_that_runs_out_in_the_queue_of_a_stream_is_its_only_event(
    make: Callable[..., HttpService],
) -> None:
    clock = FakeClock()
    service = make(engine_options={"max_num_seqs": 1, "clock": clock})
    service.runner.gated = True
    busy = Connection(service.app, "/generate", as_json({**LONG, "max_tokens": 3}))
    tasks = [busy.open()]
    await settle()
    budget = {"ttft_ms": 50, "on_miss": "reject"}
    body = {**LONG, "stream": True, "budget": budget}
    late = Connection(service.app, "/generate", as_json(body))
    tasks.append(late.open())
    await settle()

    clock.now += 1
    service.runner.open()
    for task in tasks:
        await finish(task)

    [error] = parse_events(late.content.decode())
    assert late.status == 200
    assert error["error"]["code"] == "budget_unattainable"
    assert busy.status == 200


async def test_one_failed_sequence_ends_the_others_of_its_request(
    make: Callable[..., HttpService],
) -> None:
    service = make(engine_options={"max_num_seqs": 1})
    service.runner.fail_next = True

    reply = await service.post("/generate", {**LONG, "n": 3})

    reasons = {report.finish_reason for report in await service.ended.wait_for(3)}
    assert reply.status_code == 500
    assert reasons == {FinishReason.ERROR, FinishReason.ABORT}


async def test_shutdown_gives_a_running_request_what_there_is(service: HttpService) -> None:
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json(LONG))
    task = connection.open()
    streaming = Connection(service.app, "/generate", as_json({**LONG, "stream": True}))
    streaming_task = streaming.open()
    await settle()
    service.runner.permits.release()  # the first step may have begun without the second request
    service.runner.permits.release()
    await streaming.wait_for_events(1)

    service.runner.open()
    await service.worker.drain(0)
    await finish(task)
    await finish(streaming_task)

    assert connection.status == 200
    assert b'"finish_reason":"abort"' in connection.content
    assert b'"finish_reason":"abort"' in streaming.content
    assert streaming.content.endswith(b"data: [DONE]\n\n")


class Timers:
    """Takes the place of the event loop's clock: a test says when time is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._timers: list[tuple[float, asyncio.Handle]] = []
        self._passed_s = 0.0
        loop = asyncio.get_running_loop()
        real_time = loop.time
        monkeypatch.setattr(loop, "call_later", self._call_later)
        monkeypatch.setattr(loop, "time", lambda: real_time() + self._passed_s)

    def _call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.Handle:
        handle = asyncio.Handle(callback, [], asyncio.get_running_loop())
        self._timers.append((delay, handle))
        return handle

    @property
    def delays(self) -> list[float]:
        """Of the timers that run."""
        return [delay for delay, handle in self._timers if not handle.cancelled()]

    def pass_time(self, seconds: float) -> None:
        """So much time passes, and no timer rings."""
        self._passed_s += seconds

    def ring(self, delay: float, *, at_once: bool = False) -> None:
        """The time of the timers of this delay is over, ``at_once`` if it has passed already."""
        self._passed_s += 0 if at_once else delay
        due = [timer for timer in self._timers if timer[0] == delay]
        self._timers = [timer for timer in self._timers if timer[0] != delay]
        for _, handle in due:
            if not handle.cancelled():
                handle._run()


@pytest.mark.parametrize("n", [1, 3])
async def test_a_request_over_the_servers_timeout_is_cut_off(
    make: Callable[..., HttpService], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    timers = Timers(monkeypatch)
    service = make(request_timeout_s=60)
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "n": n}))
    task = connection.open()
    await settle()

    assert timers.delays == [60]
    timers.ring(60)
    service.runner.permits.release()
    await finish(task)

    assert connection.status == 504
    assert b'"code":"request_timeout"' in connection.content
    await assert_aborted(service, n, max_steps=1)


async def test_a_stream_over_the_servers_timeout_ends_with_an_error_event(
    make: Callable[..., HttpService], monkeypatch: pytest.MonkeyPatch
) -> None:
    timers = Timers(monkeypatch)
    service = make(request_timeout_s=60)
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "stream": True}))
    task = connection.open()
    service.runner.permits.release()
    await connection.wait_for_events(1)

    timers.ring(60)
    service.runner.permits.release()
    await finish(task)

    assert connection.status == 200
    assert b'"code":"request_timeout"' in connection.content
    assert connection.content.endswith(b"data: [DONE]\n\n")
    await assert_aborted(service, 1, max_steps=2)


async def test_a_stream_that_times_out_in_the_queue_says_so_in_its_only_event(
    make: Callable[..., HttpService], monkeypatch: pytest.MonkeyPatch
) -> None:
    timers = Timers(monkeypatch)
    service = make(request_timeout_s=60, engine_options={"max_num_seqs": 1})
    service.runner.gated = True
    stream = as_json({**LONG, "stream": True})
    running, queued = (Connection(service.app, "/generate", stream) for _ in range(2))
    tasks = [running.open()]
    service.runner.permits.release()
    await running.wait_for_events(1)
    tasks.append(queued.open())
    await settle()

    timers.ring(60)
    service.runner.open()
    for task in tasks:
        await finish(task)

    [error] = parse_events(queued.content.decode())
    assert error["error"]["code"] == "request_timeout"
    assert running.status == queued.status == 200


async def test_a_silent_stream_carries_a_comment_every_ten_seconds(
    service: HttpService, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers = Timers(monkeypatch)
    service.runner.gated = True
    body = {**LONG, "max_tokens": 2, "stream": True}
    connection = Connection(service.app, "/generate", as_json(body))
    task = connection.open()
    await settle()

    for _ in range(2):  # before the first token
        assert timers.delays == [10]
        timers.ring(10)
        await settle()
    service.runner.permits.release()
    await connection.wait_for_events(3)
    await settle()
    assert timers.delays == [10]  # from the token on
    timers.ring(10)
    await settle()
    service.runner.open()
    await finish(task)

    parts = connection.content.decode().split("\n\n")
    assert [part.partition(":")[0] for part in parts] == ["", "", "data", "", "data", "data", ""]
    assert timers.delays == []
    assert connection.messages[-1]["more_body"] is False


async def test_what_is_sent_puts_the_comment_off(
    service: HttpService, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers = Timers(monkeypatch)
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "stream": True}))
    task = connection.open()
    await settle()

    timers.pass_time(4)
    service.runner.permits.release()
    await connection.wait_for_events(1)
    await settle()
    timers.pass_time(6)
    timers.ring(10, at_once=True)
    await settle()
    [left_s] = timers.delays

    assert 3.9 < left_s <= 4  # ten seconds after the token
    assert ": waiting" not in connection.content.decode()
    timers.ring(left_s)
    await settle()
    assert connection.content.decode().endswith(": waiting\n\n")
    service.runner.open()
    await finish(task)


async def test_a_comment_that_cannot_be_sent_ends_the_request(
    service: HttpService, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers = Timers(monkeypatch)
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({**LONG, "stream": True}))
    task = connection.open()
    await settle()

    connection.send_fails = True
    timers.ring(10)
    await settle()
    service.runner.permits.release()
    await finish(task)

    await assert_aborted(service, 1, max_steps=1)


async def test_a_comment_that_a_slow_client_holds_up_does_not_outlive_its_stream(
    service: HttpService, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers = Timers(monkeypatch)
    may_send = asyncio.Event()

    async def hold(message: Message) -> None:
        if message.get("body", b"").startswith(b":"):
            await may_send.wait()

    service.runner.gated = True
    body = {**LONG, "max_tokens": 1, "stream": True}
    connection = Connection(service.app, "/generate", as_json(body), before_send=hold)
    task = connection.open()
    await settle()
    timers.ring(10)
    await settle()
    service.runner.open()
    await finish(task)
    may_send.set()
    await settle()

    assert connection.messages[-1]["more_body"] is False
    assert b": waiting" not in connection.content
