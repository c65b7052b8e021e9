"""The same service over replicas: equal replies, and what becomes of refusals, losses, departures.

The replicas are engines of this process; every message between them and the ingress is pickled.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from sortserve.core.budget import Budget
from sortserve.core.errors import OverloadedError
from sortserve.replicas.choice import RoutedRequest
from sortserve.replicas.messages import MAX_TRANSIT_S, Accepted, Handover
from support.http_service import MODEL, Connection, HttpService, as_json
from support.scripted import depth_letter, make_request
from support.scripted_replicas import Replicas

Make = Callable[..., HttpService]
TEXT = {"prompt": "a", "max_tokens": 6, "ignore_eos": True}
GENERATE = "/generate"


def pair(make: Make, **options: Any) -> Replicas:
    """Two replicas, of which a is asked first as long as it has no more to do than b."""
    settings = options.pop("settings", {})
    clocks = options.pop("unix_clocks", None)
    services = {name: make(rule=depth_letter, **options) for name in ("a", "b")}
    return Replicas(services, unix_clocks=clocks, **settings)


def told(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply without ids and times, which differ from call to call."""
    hidden = ("id", "created", "ttft_ms", "tpot_ms", "actual_ms", "request_id")

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stripped(v) for k, v in value.items() if k not in hidden}
        return [stripped(own) for own in value] if isinstance(value, list) else value

    result: dict[str, Any] = stripped(reply)
    return result


BODIES = {
    "full depth": (GENERATE, TEXT),
    "exit 2": (GENERATE, {**TEXT, "budget": {"exit_layer": 2}}),
    "exit 4": (GENERATE, {**TEXT, "budget": {"exit_layer": 4}}),
    "changing depth": (GENERATE, {**TEXT, "budget": {"schedule": [[0, 6], [3, 2]]}}),
    "samples": (GENERATE, {**TEXT, "n": 3, "seed": 1}),
    "a form": (GENERATE, {**TEXT, "format": {"regex": "x?y"}}),
    "prompts": ("/v1/completions", {"model": MODEL, "prompt": ["a", "bcd"], "max_tokens": 3}),
    "prompts that are scored": (
        "/v1/completions",
        {
            "model": f"{MODEL}@4",
            "prompt": ["abcd", "bcd"],
            "max_tokens": 2,
            "n": 2,
            "logprobs": 1,
            "echo": True,
        },
    ),
    "a chat": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
    ),
}


@pytest.mark.parametrize("name", BODIES)
async def test_replies_are_those_of_a_single_server(make: Make, name: str) -> None:
    path, body = BODIES[name]
    alone = await make(rule=depth_letter).post(path, body)
    replicas = pair(make)

    reply = await replicas.http.post(path, body)

    assert reply.status_code == alone.status_code == 200, reply.text
    assert told(reply.json()) == told(alone.json())
    headers = ("x-exit-layer", "x-degraded")
    assert [reply.headers[own] for own in headers] == [alone.headers[own] for own in headers]
    await replicas.settle()


@pytest.mark.parametrize("name", BODIES)
async def test_streams_are_those_of_a_single_server(make: Make, name: str) -> None:
    path, body = BODIES[name]
    alone = await make(rule=depth_letter).events(path, body)
    replicas = pair(make)

    events = await replicas.http.events(path, body)

    def texts(events: list[dict[str, Any]]) -> dict[int, str]:
        found: dict[int, str] = {}
        for event in events:
            for choice in event.get("choices", [event]):
                said = choice.get("delta", choice)
                text = said.get("text") or said.get("content") or ""
                index = choice.get("index", 0)
                found[index] = found.get(index, "") + text
        return found

    assert texts(events) == texts(alone)
    assert len(events) == len(alone), "one event per token"
    await replicas.settle()


async def test_each_token_is_an_event_as_soon_as_it_is_made(make: Make) -> None:
    replicas = pair(make)
    runner = replicas.services["a"].runner
    runner.gated = True
    connection = Connection(replicas.http.app, GENERATE, as_json({**TEXT, "stream": True}))
    exchange = connection.open()

    for count in range(1, 5):
        runner.permits.release()
        await connection.wait_for_events(count)
        assert connection.content.count(b"\n\n") == count, "the engine waits for its next step"

    runner.open()
    await exchange
    assert connection.content.endswith(b"[DONE]\n\n")


async def test_mistakes_are_refused_in_the_words_of_a_single_server(make: Make) -> None:
    body = {"model": MODEL, "prompt": ["a", "a" * 300], "max_tokens": 3}
    alone = await make().post("/v1/completions", body)
    replicas = pair(make)

    reply = await replicas.http.post("/v1/completions", body)

    assert reply.status_code == alone.status_code == 400
    assert reply.json() == alone.json()
    assert len(replicas.sent_to()) <= 1, "another replica would say the same"


# ---- refusals ----


def full(service: HttpService, retry_after_s: float) -> None:
    """Let a replica refuse whatever comes, though its report says that it takes requests."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OverloadedError("The queue is full.", retry_after_s=retry_after_s)

    service.worker.reserve = refuse  # type: ignore[method-assign]


async def test_a_refusal_is_retried_once_elsewhere(make: Make) -> None:
    replicas = pair(make)
    full(replicas.services["a"], 7.0)

    reply = await replicas.http.post(GENERATE, TEXT)

    assert reply.status_code == 200
    assert replicas.sent_to() == ["a", "b"]
    await replicas.settle()


async def test_where_all_refuse_the_client_hears_when_the_first_has_room(make: Make) -> None:
    services = {name: make() for name in ("a", "b", "c")}
    replicas = Replicas(services)
    for own, retry_after_s in zip(services.values(), (7.0, 3.0, 1.0), strict=True):
        full(own, retry_after_s)

    reply = await replicas.http.post(GENERATE, TEXT)

    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "3"
    assert replicas.sent_to() == ["a", "b"], "once, not until somebody takes it"
    await replicas.settle()


async def test_a_refusal_is_not_retried_once_the_budget_is_over(make: Make) -> None:
    replicas = pair(make)
    full(replicas.services["a"], 1.0)
    clock = replicas.engines.clock
    host = replicas.link.hosts["a"]
    generate = host.generate

    def slow(handover: Any) -> Any:
        replicas.engines.clock = lambda: clock() + 10
        for group in replicas.engines.groups:
            group._clock = replicas.engines.clock
        return generate(handover)

    host.generate = slow  # type: ignore[method-assign]

    reply = await replicas.http.post(GENERATE, {**TEXT, "budget": {"latency_ms": 5000}})

    assert reply.status_code == 429
    assert replicas.sent_to() == ["a"]


async def test_a_replica_that_drains_is_passed_over(make: Make) -> None:
    replicas = pair(make)
    await asyncio.to_thread(replicas.services["a"].worker.stop)

    first = await replicas.http.post(GENERATE, TEXT)  # its last report says that it is ready
    replicas.link.refresh()
    second = await replicas.http.post(GENERATE, TEXT)

    assert first.status_code == second.status_code == 200
    assert replicas.sent_to() == ["a", "b", "b"]


# ---- losses ----


async def test_a_stream_that_was_read_ends_with_an_error_when_its_replica_is_lost(
    make: Make,
) -> None:
    replicas = pair(make)
    replicas.link.lost["a"] = 2
    runner = replicas.services["a"].runner
    runner.gated = True
    connection = Connection(replicas.http.app, GENERATE, as_json({**TEXT, "stream": True}))
    exchange = connection.open()
    for count in (1, 2, 3):
        runner.permits.release()
        await connection.wait_for_events(count)
    runner.open()
    await exchange

    lines = connection.content.decode().split("\n")
    *texts, error = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert len(texts) == 2
    assert error["error"]["code"] == "replica_lost"
    assert replicas.sent_to() == ["a"], "what has been read cannot be taken back"
    await replicas.settle()


async def test_a_stream_that_was_not_read_yet_goes_elsewhere(make: Make) -> None:
    replicas = pair(make)
    replicas.link.lost["a"] = 0

    events = await replicas.http.events(GENERATE, TEXT)

    assert replicas.sent_to() == ["a", "b"]
    assert sum(len(event["choices"][0]["text"]) for event in events) == 6
    await replicas.settle()


@pytest.mark.parametrize("after", [None, 0])
async def test_a_reply_that_is_not_streamed_is_made_anew_elsewhere(
    make: Make, after: int | None
) -> None:
    alone = await make(rule=depth_letter).post(GENERATE, {**TEXT, "n": 2})
    replicas = pair(make)
    replicas.link.lost["a"] = after

    reply = await replicas.http.post(GENERATE, {**TEXT, "n": 2})

    assert reply.status_code == 200
    assert told(reply.json()) == told(alone.json())
    assert replicas.sent_to() == ["a", "b"]
    await replicas.settle()


async def test_a_request_that_is_lost_twice_is_given_up(make: Make) -> None:
    replicas = pair(make)
    replicas.link.lost.update(a=0, b=0)

    reply = await replicas.http.post(GENERATE, TEXT)

    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "replica_lost"
    assert replicas.sent_to() == ["a", "b"]
    await replicas.settle()


# ---- departures ----


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_pages_come_back_when_the_client_leaves(make: Make, is_streamed: bool) -> None:
    replicas = pair(make)
    service = replicas.services["a"]
    service.runner.gated = True
    body = as_json({**TEXT, "max_tokens": 60, "n": 2, "stream": is_streamed})
    connection = Connection(replicas.http.app, GENERATE, body)
    exchange = connection.open()
    for _ in range(3):
        service.runner.permits.release()
    async with asyncio.timeout(30):
        while service.worker.stats().kv_pages_used == 0:
            await asyncio.sleep(0.01)

    connection.leave()
    await exchange
    service.runner.open()

    await replicas.settle()
    assert replicas.link.num_closed == 1


async def test_a_request_that_takes_too_long_is_answered_504(make: Make) -> None:
    replicas = pair(make, settings={"request_timeout_s": 0.05})
    replicas.services["a"].runner.gated = True

    reply = await replicas.http.post(GENERATE, TEXT)
    replicas.services["a"].runner.open()

    assert reply.status_code == 504
    await replicas.settle()


async def test_draining_lets_requests_end_and_takes_no_new_ones(make: Make) -> None:
    replicas = pair(make)
    runner = replicas.services["a"].runner
    runner.gated = True
    running = asyncio.create_task(replicas.http.post(GENERATE, TEXT))
    async with asyncio.timeout(30):
        while not replicas.link.handovers:
            await asyncio.sleep(0.01)

    draining = asyncio.create_task(replicas.engines.drain(30.0))
    await asyncio.sleep(0)
    refused = await replicas.http.post(GENERATE, TEXT)
    health = await replicas.http.get("/health")
    runner.open()

    assert (refused.status_code, health.status_code) == (503, 503)
    assert (await running).status_code == 200
    assert await draining
    assert replicas.engines.state == "stopped"


async def test_what_does_not_end_in_time_is_aborted(make: Make) -> None:
    replicas = pair(make)
    runner = replicas.services["a"].runner
    runner.gated = True
    running = asyncio.create_task(replicas.http.post(GENERATE, TEXT))
    async with asyncio.timeout(30):
        while not any(group.is_accepted for group in replicas.engines.groups):
            await asyncio.sleep(0.01)

    assert not await replicas.engines.drain(0.0)
    runner.open()

    reply = await running
    assert (reply.status_code, reply.json()["choices"][0]["finish_reason"]) == (200, "abort")
    await replicas.settle()


# ---- deadlines ----


@pytest.mark.parametrize(
    ("here_unix_s", "transit_s"),
    [(100.0, 0.0), (101.5, 1.5), (99.0, 0.0), (3700.0, MAX_TRANSIT_S)],
    ids=["at once", "on its way", "clock behind", "clock an hour ahead"],
)
async def test_deadlines_count_from_the_arrival_at_the_ingress(
    make: Make, here_unix_s: float, transit_s: float
) -> None:
    replicas = pair(make, unix_clocks={"a": lambda: here_unix_s})
    service = replicas.services["a"]
    now = service.worker.clock()
    request = make_request(max_tokens=2, arrival_s=-12345.0, budget=Budget(latency_ms=60_000))
    handover = Handover(
        requests=(request,),
        num_samples=1,
        routed=RoutedRequest(arrival_s=0.0, num_prompt_tokens=1, num_output_tokens=2),
        elapsed_s=2.0,
        sent_unix_s=100.0,
    )

    items = [item async for item in replicas.link.hosts["a"].generate(handover)]

    [report] = await service.ended.wait_for(1)
    assert now - report.arrival_s == pytest.approx(2.0 + transit_s)
    assert isinstance(items[0], Accepted)
    assert items[0].arrival_s == report.arrival_s


async def test_replies_tell_times_from_the_arrival_at_the_ingress(make: Make) -> None:
    replicas = pair(make)
    [stream] = await replicas.engines.submit_all(
        [make_request(arrival_s=replicas.engines.clock())], replicas.engines.reserve(1, 1)
    )

    outputs = [output async for output in stream]

    report = outputs[-1].report
    assert report is not None
    [there] = await replicas.services["a"].ended.wait_for(1)
    assert report.e2e_s == pytest.approx(there.e2e_s)
    assert abs(report.arrival_s - there.arrival_s) > 1.0, "two clocks"


# ---- how they stand ----


async def test_health_tells_of_every_replica(make: Make) -> None:
    replicas = pair(make)
    await asyncio.to_thread(replicas.services["b"].worker.stop)
    replicas.link.refresh()

    reply = await replicas.http.get("/health")

    assert reply.json() == {"status": "ready", "replicas": {"a": "ready", "b": "stopped"}}


async def test_without_a_replica_nobody_waits(make: Make) -> None:
    replicas = pair(make)
    replicas.link.directory.update({"c": None})

    health = await replicas.http.get("/health")
    reply = await replicas.http.post(GENERATE, TEXT)

    assert health.status_code == reply.status_code == 503
    assert reply.headers["retry-after"] == "5"
    assert (await replicas.http.get("/livez")).status_code == 200


async def test_one_scrape_has_the_metrics_of_all(make: Make) -> None:
    replicas = pair(make)
    await replicas.http.post(GENERATE, TEXT)
    await replicas.services["a"].ended.wait_for(1)
    replicas.link.refresh()

    text = (await replicas.http.get("/metrics")).text
    status = (await replicas.http.get("/status")).json()

    tokens = [
        line for line in text.splitlines() if line.startswith("sortserve_generation_tokens_total{")
    ]
    own = f'exit_layer="6",model_name="{MODEL}"}}'
    assert f'sortserve_generation_tokens_total{{replica="a",{own} 6.0' in tokens
    assert f'sortserve_generation_tokens_total{{replica="b",{own} 0.0' in tokens
    assert 'sortserve_http_requests_total{replica="ingress"' in text
    assert 'sortserve_replicas{state="ready"} 2' in text
    assert text.count("# TYPE sortserve_generation_tokens_total counter") == 1
    assert status["tokens_by_exit"] == {"2": 0, "4": 0, "6": 6}


async def test_a_scrape_is_whole_without_a_replica_that_is_silent(make: Make) -> None:
    replicas = pair(make)
    replicas.link.silent.add("b")

    text = (await replicas.http.get("/metrics")).text

    assert "sortserve_replicas_scraped 1" in text
    assert 'replica="a"' in text
    assert 'replica="b"' not in text
