"""Depth is not lost in silence: who may be made shallower, and how a client hears of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Any

import pytest

from sortserve.core.budget import Budget
from sortserve.cost.model import CostModel
from sortserve.engine.worker import EngineWorker, RequestStream
from support.http_service import HttpService, make_service, parse_events

LINE = (0.0, 1e-3, 1e-3, 0.0, 0.0)  # a millisecond a layer, and one more a layer and token
LONG = {"prompt": "a" * 100, "max_tokens": 2}
SHORT = {"prompt": "a", "max_tokens": 2}


@contextmanager
def calibrated(
    *,
    overload_degrade: bool = False,
    min_quality: float = 0.0,
    table: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Iterator[HttpService]:
    service = make_service(
        engine_options={
            "overload_degrade": overload_degrade,
            "overload_delay_s": 0.2,
            "min_quality": min_quality,
            **table,
        },
        **settings,
    )
    service.engine.costs.use(CostModel(LINE, LINE))
    try:
        yield service
    finally:
        service.runner.open()
        service.worker.stop()


@asynccontextmanager
async def overloaded(service: HttpService, num_before: int = 0) -> AsyncIterator[None]:
    """While a long prompt waits for its first step: 0.6 s, by the model."""
    service.runner.gated = True
    waiting = asyncio.create_task(service.post("/generate", LONG))
    await accepted(service, num_before + 1)
    yield
    service.runner.open()
    assert (await waiting).status_code == 200


async def accepted(service: HttpService, count: int) -> None:
    """Wait until so many sequences have been let in, whether or not a step has run."""
    while service.worker._ledger.num_accepted < count:
        await asyncio.sleep(0)


async def ask(service: HttpService, path: str, body: dict[str, Any]) -> Any:
    """The reply to a request that comes during overload."""
    num_before = service.worker._ledger.num_accepted
    async with overloaded(service, num_before):
        asking = asyncio.create_task(service.post(path, body))
        await accepted(service, num_before + 2)
    return await asking


async def test_overload_takes_no_depth_from_who_did_not_ask_for_it() -> None:
    with calibrated() as service:
        reply = await ask(service, "/generate", SHORT)

    assert reply.json()["budget"]["tokens_by_exit"] == {"6": 2}
    assert reply.json()["budget"]["degraded"] is False
    assert reply.json()["model"] == "tiny"
    assert reply.headers["x-exit-layer"] == "6"
    assert reply.headers["x-degraded"] == "false"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_where_the_server_may_take_depth_the_model_and_the_headers_say_so(path: str) -> None:
    with calibrated(overload_degrade=True) as service:
        reply = await ask(service, path, SHORT)

    assert reply.json()["model"] == "tiny@4"
    assert reply.json()["budget"]["degraded"] is True
    assert reply.headers["x-exit-layer"] == "4"
    assert reply.headers["x-degraded"] == "true"
    assert "x-budget-met" not in reply.headers


async def test_a_stream_says_so_from_its_headers_on() -> None:
    with calibrated(overload_degrade=True) as service:
        reply = await ask(service, "/v1/completions", {**SHORT, "stream": True})

    assert reply.headers["x-exit-layer"] == "4"
    assert reply.headers["x-degraded"] == "true"
    assert float(reply.headers["x-predicted-ms"]) > 0
    assert {event["model"] for event in parse_events(reply.text)} == {"tiny@4"}


async def test_overload_stops_at_the_servers_floor() -> None:
    with calibrated(overload_degrade=True, min_quality=0.9) as service:
        reply = await ask(service, "/generate", SHORT)

    assert reply.headers["x-exit-layer"] == "6"


async def test_a_default_budget_with_a_floor_lets_overload_take_depth_down_to_it() -> None:
    with calibrated(default_budget=Budget(min_quality=0.5)) as service:
        plain = await ask(service, "/generate", SHORT)
        own = await ask(service, "/generate", {**SHORT, "budget": {"compute": 1.0}})

    assert plain.json()["model"] == "tiny@4"
    assert own.json()["model"] == "tiny", "who has a budget of its own has no other"


@pytest.mark.parametrize(
    ("body", "headers", "exit_layer"),
    [
        pytest.param({}, {}, 2, id="none"),
        pytest.param({"budget": {}}, {}, 2, id="empty"),
        pytest.param({"budget": {"latency_ms": None}}, {}, 2, id="null"),
        pytest.param({"budget": {"compute": 0.8}}, {}, 4, id="body"),
        pytest.param({}, {"x-slo-e2e-ms": "86400000"}, 6, id="header"),
        pytest.param({"model": "tiny@4"}, {}, 4, id="model"),
    ],
)
async def test_the_default_budget_is_that_of_requests_that_give_none(
    body: dict[str, Any], headers: dict[str, str], exit_layer: int
) -> None:
    with calibrated(default_budget=Budget(compute=0.6)) as service:
        reply = await service.post("/generate", {**SHORT, **body}, **headers)

    assert reply.json()["budget"]["exit_layer"] == exit_layer
    assert reply.json()["budget"]["degraded"] is False


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"prompt": "a", "n": 6}, id="n"),
        pytest.param({"prompt": ["a", "b" * 40, "c"], "n": 2}, id="prompts"),
    ],
)
@pytest.mark.parametrize("latency_ms", [None, 400, 700])
async def test_all_answers_to_one_request_start_at_one_exit(
    body: dict[str, Any], latency_ms: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []
    submit = EngineWorker.submit

    def watched(*args: Any, **options: Any) -> RequestStream:
        stream = submit(*args, **options)
        starts.append(stream.choice.exit_layer)
        return stream

    monkeypatch.setattr(EngineWorker, "submit", watched)
    request = {**body, "max_tokens": 8, "budget": {"latency_ms": latency_ms}}
    with calibrated(overload_degrade=True) as service:
        async with overloaded(service):
            asking = asyncio.create_task(service.post("/v1/completions", request))
            await accepted(service, 7)
        reply = (await asking).json()

    choices = [choice["budget"] for choice in reply["choices"]]
    assert len(choices) == 6
    assert len(starts) == 7
    assert len(set(starts[1:])) == 1, "beside the long prompt all start alike"
    if latency_ms is None:
        assert {json.dumps(budget["tokens_by_exit"]) for budget in choices} == {'{"4": 8}'}


async def test_a_budget_of_time_is_told_in_the_headers() -> None:
    with calibrated() as service:
        reply = await service.post("/generate", {**SHORT, "budget": {"latency_ms": 60000}})

    assert reply.headers["x-budget-met"] == "true"
    assert float(reply.headers["x-predicted-ms"]) == reply.json()["budget"]["predicted_ms"]


async def test_a_schedule_is_what_the_client_asked_for_and_no_loss_of_depth() -> None:
    with calibrated() as service:
        body = {"prompt": "a", "max_tokens": 4, "budget": {"schedule": [[0, 6], [2, 4]]}}
        whole = await service.post("/generate", body)
        events = await service.events("/generate", body)

    assert whole.json()["budget"]["tokens_by_exit"] == {"6": 2, "4": 2}
    assert whole.json()["budget"]["degraded"] is False
    assert whole.headers["x-degraded"] == "false"
    assert {whole.json()["model"], *(event["model"] for event in events)} == {"tiny"}


MEASURED = {"scores": (0.3, 0.6, 1.0), "schedules": {"0:6,10:2": 0.8}}


@pytest.mark.parametrize(
    ("latency_ms", "tokens_by_exit"),
    [(500, {"6": 30}), (380, {"4": 30}), (280, {"6": 10, "2": 20}), (200, {"2": 30})],
)
async def test_a_measured_schedule_is_followed_where_it_brings_more_than_any_exit_in_time(
    latency_ms: int, tokens_by_exit: dict[str, int]
) -> None:
    body = {"prompt": "a", "max_tokens": 30, "budget": {"latency_ms": latency_ms}}

    with calibrated(table=MEASURED) as service:
        whole = await service.post("/generate", body)
        events = await service.events("/generate", body)

    for budget in (whole.json()["budget"], events[-1]["budget"]):
        assert budget["tokens_by_exit"] == tokens_by_exit
        assert budget["predicted_ms"] <= latency_ms
        assert budget["met"] is True
    assert whole.headers["x-degraded"] == ("false" if tokens_by_exit == {"6": 30} else "true")


def gauge(text: str, name: str) -> float:
    (line,) = (line for line in text.splitlines() if line.startswith(f"sortserve_{name}{{"))
    return float(line.rpartition(" ")[2])


async def test_metrics_show_the_level_and_where_a_newcomer_would_start() -> None:
    names = ("overload_level", "default_exit_layer", "min_quality", "pressure")

    async def read(service: HttpService) -> list[float]:
        text = (await service.get("/metrics")).text
        return [gauge(text, name) for name in names]

    with calibrated(overload_degrade=True, min_quality=0.5) as service:
        idle = await read(service)
        async with overloaded(service):
            busy, again = await read(service), await read(service)

    assert idle == [0, 6, 0.5, 0]
    assert busy == again, "to look changes nothing"
    assert busy[:3] == [1, 4, 0.5]


async def test_the_pressure_is_that_of_the_promises() -> None:
    with calibrated() as service:
        service.runner.gated = True
        body = {**LONG, "budget": {"latency_ms": 5000, "min_exit_layer": 6}}
        asking = asyncio.create_task(service.post("/generate", body))
        await accepted(service, 1)
        busy = gauge((await service.get("/metrics")).text, "pressure")
        service.runner.open()
        await asking
        idle = gauge((await service.get("/metrics")).text, "pressure")

    assert 0.05 < busy < 0.5
    assert idle == 0


async def test_the_headers_are_part_of_the_document() -> None:
    with calibrated() as service:
        document = (await service.get("/openapi.json")).json()

    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        headers = document["paths"][path]["post"]["responses"]["200"]["headers"]
        assert set(headers) == {"x-exit-layer", "x-degraded", "x-predicted-ms", "x-budget-met"}
