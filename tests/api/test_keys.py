"""API keys with limits of their own, on every route: refused, counted, corrected, released."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from sortserve.core.api_keys import KeyPolicy, key_digest
from sortserve.core.budget import Budget
from sortserve.core.schedule import DepthSchedule
from support.http_service import WAIT_S, Connection, HttpService, as_json

Make = Callable[..., HttpService]
PROMPT = "abcdefgh"
CHAT = [{"role": "user", "content": PROMPT}]
ROUTES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": PROMPT, "max_tokens": 4},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 4},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 4},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 4},
}
AUTHORIZED = {"authorization": "Bearer k"}


class Clock:
    now = 5000.0

    def __call__(self) -> float:
        return self.now


def policy(**limits: Any) -> KeyPolicy:
    return KeyPolicy(name="alice", digests=(key_digest("k"),), **limits)


def connection(service: HttpService, path: str, body: dict[str, Any]) -> Connection:
    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer k")]
    return Connection(service.app, path, as_json(body), headers=headers)


async def metric(service: HttpService, name: str, **labels: str) -> float:
    """The value of a series of alice's."""
    said = ",".join(
        f'{k}="{v}"' for k, v in {"key": "alice", "model_name": "tiny", **labels}.items()
    )
    wanted = dict(part.split("=") for part in said.split(","))
    for line in (await service.get("/metrics")).text.splitlines():
        head, _, value = line.rpartition(" ")
        series, _, rest = head.partition("{")
        if series == f"sortserve_api_key_{name}":
            given = dict(part.split("=") for part in rest.rstrip("}").split(","))
            if given == wanted:
                return float(value)
    raise AssertionError(f"no series {name} {labels}")


@pytest.mark.parametrize("path", ROUTES)
async def test_requests_a_minute_are_refused_on_every_route(make: Make, path: str) -> None:
    service = make(key_policies=[policy(requests_per_minute=2)], clock=Clock())
    replies = [await service.post(path, ROUTES[path], **AUTHORIZED) for _ in range(3)]

    assert [reply.status_code for reply in replies] == [200, 200, 429]
    error = replies[2].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "alice" in error["message"]
    assert "requests_per_minute: limit 2" in error["message"]
    assert replies[2].headers["retry-after"] == "30"
    assert "x-should-retry" not in replies[2].headers
    for reply, left in zip(replies, "100", strict=True):
        assert reply.headers["x-ratelimit-limit-requests"] == "2"
        assert reply.headers["x-ratelimit-remaining-requests"] == left
    assert [r.headers["x-ratelimit-reset-requests"] for r in replies] == ["30s", "1m0s", "1m0s"]
    assert await metric(service, "requests_total") == 2
    assert await metric(service, "limited_total", limit="requests_per_minute") == 1


async def test_who_comes_back_when_told_to_is_let_in(make: Make) -> None:
    clock = Clock()
    service = make(key_policies=[policy(requests_per_minute=1)], clock=clock)
    await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)
    refused = await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)

    clock.now += float(refused.headers["retry-after"])

    assert (await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_counted_as_used_on_every_route(
    make: Make, path: str, stream: bool
) -> None:
    service = make(key_policies=[policy(tokens_per_minute=1000)], clock=Clock())

    reply = await service.post(path, {**ROUTES[path], "stream": stream}, **AUTHORIZED)

    assert reply.status_code == 200
    after = await service.get("/version", **AUTHORIZED)
    assert int(after.headers["x-ratelimit-remaining-tokens"]) == 1000 - len(PROMPT) - 4
    assert await metric(service, "prompt_tokens_total") == len(PROMPT)
    assert await metric(service, "generation_tokens_total") == 4
    assert await metric(service, "requests_running") == 0


async def test_a_stream_is_charged_when_it_starts_and_corrected_when_it_ends(make: Make) -> None:
    service = make(key_policies=[policy(tokens_per_minute=300)], clock=Clock())
    service.runner.gated = True
    body = {"prompt": PROMPT, "max_tokens": 200, "stream": True}
    streaming = connection(service, "/generate", body)
    task = streaming.open()
    service.runner.permits.release()
    await streaming.wait_for_events(1)
    estimate = len(PROMPT) // 4 + 1

    during = await service.get("/version", **AUTHORIZED)
    refused = await service.post("/generate", {**body, "stream": False}, **AUTHORIZED)

    assert int(during.headers["x-ratelimit-remaining-tokens"]) == 100 - estimate
    assert refused.status_code == 429
    assert "tokens_per_minute: limit 300" in refused.json()["error"]["message"]
    assert await metric(service, "limited_total", limit="tokens_per_minute") == 1
    streaming.leave()
    service.runner.open()
    async with asyncio.timeout(WAIT_S):
        await task
    after = await service.get("/version", **AUTHORIZED)
    used = 300 - int(after.headers["x-ratelimit-remaining-tokens"])
    assert len(PROMPT) < used < len(PROMPT) + 10, "what was read and made, not what might have been"


async def test_a_request_without_a_limit_of_its_own_is_charged_with_what_is_usual(
    make: Make,
) -> None:
    """Not with all the context: a key of 1,000 tokens a minute could then ask nothing."""
    service = make(key_policies=[policy(tokens_per_minute=300)], clock=Clock())

    reply = await service.post(
        "/v1/chat/completions", {"messages": CHAT, "stop": "l"}, **AUTHORIZED
    )

    assert reply.status_code == 200


@pytest.mark.parametrize("path", ROUTES)
async def test_concurrency_is_released_when_a_client_leaves(make: Make, path: str) -> None:
    service = make(key_policies=[policy(max_concurrency=1)])
    service.runner.gated = True
    first = connection(service, path, {**ROUTES[path], "stream": True})
    task = first.open()
    service.runner.permits.release()
    await first.wait_for_events(1)
    refused = await service.post(path, ROUTES[path], **AUTHORIZED)
    assert refused.status_code == 429
    assert "max_concurrency: limit 1" in refused.json()["error"]["message"]
    assert await metric(service, "requests_running") == 1

    first.leave()
    service.runner.open()
    async with asyncio.timeout(WAIT_S):
        await task

    assert (await service.post(path, ROUTES[path], **AUTHORIZED)).status_code == 200
    assert service.keys is not None
    service.keys.check_invariants()
    assert await metric(service, "requests_running") == 0


async def test_a_cancelled_request_gives_its_place_back(make: Make) -> None:
    service = make(key_policies=[policy(max_concurrency=1)])
    service.runner.gated = True
    task = connection(service, "/generate", ROUTES["/generate"]).open()
    for _ in range(20):
        await asyncio.sleep(0)

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    service.runner.open()

    assert (await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)).status_code == 200


@pytest.mark.parametrize(
    "body", [{}, {"prompt": 3}, {"prompt": "a", "max_tokens": -1}, {"prompt": "a" * 9999}]
)
async def test_what_is_refused_for_its_body_gives_back_its_place_and_no_token(
    make: Make, body: dict[str, Any]
) -> None:
    service = make(key_policies=[policy(max_concurrency=1, tokens_per_minute=99999)], clock=Clock())

    for _ in range(3):
        reply = await service.post("/generate", body, **AUTHORIZED)
        assert reply.status_code == 400
        assert reply.headers["x-ratelimit-remaining-tokens"] != "0"

    after = await service.get("/version", **AUTHORIZED)
    assert after.headers["x-ratelimit-remaining-tokens"] == "99999"
    assert service.keys is not None
    service.keys.check_invariants()


async def test_a_failed_step_gives_the_place_back(make: Make) -> None:
    service = make(key_policies=[policy(max_concurrency=1)])
    service.runner.fail_next = True

    failed = await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)
    again = await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)

    assert (failed.status_code, again.status_code) == (500, 200)


@pytest.mark.parametrize("path", ["/exits", "/v1/models", "/status", "/version", "/openapi.json"])
async def test_who_only_looks_is_not_counted(make: Make, path: str) -> None:
    service = make(key_policies=[policy(requests_per_minute=1, max_concurrency=1)], clock=Clock())

    replies = [await service.get(path, **AUTHORIZED) for _ in range(3)]

    assert [reply.status_code for reply in replies] == [200] * 3
    assert {reply.headers["x-ratelimit-remaining-requests"] for reply in replies} == {"1"}


@pytest.mark.parametrize("path", ["/", "/health", "/livez", "/readyz", "/metrics", "/docs"])
async def test_what_is_open_stays_open_and_tells_no_limit(make: Make, path: str) -> None:
    service = make(key_policies=[policy(requests_per_minute=1)])

    reply = await service.get(path)

    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize("path", ["/exits", "/status", "/load", "/v1/models", "/openapi.json"])
async def test_without_any_key_nobody_may_ask(make: Make, path: str) -> None:
    """A file with an empty list closes the server; it does not open it."""
    service = make(key_policies=[])

    assert (await service.get(path)).status_code == 401
    assert (await service.get(path, **AUTHORIZED)).status_code == 401


async def test_tokenizing_counts_as_a_request(make: Make) -> None:
    service = make(key_policies=[policy(requests_per_minute=1)], clock=Clock())

    first = await service.post("/tokenize", {"prompt": "a"}, **AUTHORIZED)
    second = await service.post("/detokenize", {"tokens": [97]}, **AUTHORIZED)

    assert (first.status_code, second.status_code) == (200, 429)


async def test_scripts_of_other_origins_may_read_the_limits(make: Make) -> None:
    origin = "https://app.example"
    service = make(key_policies=[policy(requests_per_minute=9)], cors_allow_origins=(origin,))

    reply = await service.get("/version", origin=origin, **AUTHORIZED)

    exposed = reply.headers["access-control-expose-headers"].lower().split(", ")
    assert {name for name in reply.headers if name.startswith("x-ratelimit")} <= set(exposed)


# Depth.

DEEP: list[tuple[dict[str, Any], str]] = [
    ({"budget": {"exit_layer": 6}}, "budget.exit_layer"),
    ({"budget": {"min_exit_layer": 6}}, "budget.min_exit_layer"),
    ({"budget": {"min_exit_layer": 5}}, "budget.min_exit_layer"),
    ({"budget": {"schedule": [[0, 6], [2, 2]]}}, "budget.schedule"),
    ({"model": "tiny@6"}, "budget.exit_layer"),
]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [*(("/generate", *case) for case in DEEP), *((path, *DEEP[0]) for path in ROUTES)],
)
async def test_an_exit_that_a_key_may_not_have_is_refused_by_name(
    make: Make, path: str, fields: dict[str, Any], param: str
) -> None:
    service = make(key_policies=[policy(max_exit_layer=4)])

    reply = await service.post(path, {**ROUTES[path], **fields}, **AUTHORIZED)

    error = reply.json()["error"]
    assert reply.status_code == 403
    assert (error["type"], error["code"]) == ("permission_error", "exit_not_allowed")
    assert error["param"] == param
    assert "max_exit_layer=4" in error["message"]
    assert reply.headers["x-should-retry"] == "false"
    assert await metric(service, "limited_total", limit="max_exit_layer") == 1
    assert service.runner.plans == []


SHALLOW: list[dict[str, Any]] = [
    {"budget": {"exit_layer": 4}},
    {"budget": {"latency_ms": 60000}},
    {"budget": {"compute": 1.0}},
    {"budget": {"min_exit_layer": 3}},
    {"model": "tiny@4"},
]


@pytest.mark.parametrize(
    ("path", "fields"),
    [*(("/generate", fields) for fields in SHALLOW), *((path, {}) for path in ROUTES)],
)
async def test_what_names_no_deeper_exit_is_served_at_most_so_deep(
    make: Make, path: str, fields: dict[str, Any]
) -> None:
    service = make(key_policies=[policy(max_exit_layer=4)])

    reply = await service.post(path, {**ROUTES[path], **fields}, **AUTHORIZED)

    assert reply.status_code == 200, reply.text
    assert reply.headers["x-exit-layer"] == "4"
    assert reply.headers["x-degraded"] == "false", "no exit that it may have was taken away"
    assert service.ended.reports[0].tokens_by_exit == {4: 4}


@pytest.mark.parametrize(
    "default",
    [
        Budget(exit_layer=6),
        Budget(min_exit_layer=6),
        Budget(min_quality=1.0),
        Budget(schedule=DepthSchedule(((0, 6), (100, 2)))),
    ],
)
async def test_a_servers_own_default_is_cut_for_a_key(make: Make, default: Budget) -> None:
    service = make(key_policies=[policy(max_exit_layer=4)], default_budget=default)

    reply = await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)

    assert (reply.status_code, reply.headers.get("x-exit-layer")) == (200, "4")


async def test_a_keys_priority_counts_for_requests_that_name_none(make: Make) -> None:
    service = make(key_policies=[policy(default_priority=10)])

    await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)
    await service.post("/generate", {**ROUTES["/generate"], "priority": 0}, **AUTHORIZED)

    weights = [report.weight for report in await service.ended.wait_for(2)]
    assert weights == [pytest.approx(1.1**-10), 1.0]


async def test_keys_without_a_name_are_told_as_one(make: Make) -> None:
    service = make(
        key_policies=[
            KeyPolicy(digests=(key_digest("k"),)),
            KeyPolicy(digests=(key_digest("k2"),)),
        ]
    )
    for key in ("k", "k2"):
        await service.post("/generate", ROUTES["/generate"], authorization=f"Bearer {key}")

    text = (await service.get("/metrics")).text
    assert 'sortserve_api_key_requests_total{key="other",model_name="tiny"} 2.0' in text


async def test_a_name_that_goes_takes_its_series_along(make: Make) -> None:
    service = make(key_policies=[policy()])
    await service.post("/generate", ROUTES["/generate"], **AUTHORIZED)
    assert 'key="alice"' in (await service.get("/metrics")).text
    assert service.keys is not None

    service.keys.replace([KeyPolicy(name="bob", digests=(key_digest("b"),))])

    text = (await service.get("/metrics")).text
    assert 'key="alice"' not in text
    assert 'sortserve_api_key_requests_total{key="bob",model_name="tiny"} 0.0' in text
