"""``docs/api.md`` names every route, field and error code, and its examples are real replies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from sortserve.api.bodies import models, parameters, unsupported
from sortserve.api.bodies.responses import ResponsesBody
from sortserve.api.replies import models as replies
from sortserve.api.replies.status import ServerStatus
from sortserve.core.budget import BUDGET_FIELDS, OnMiss
from sortserve.core.errors import SortserveError
from sortserve.core.request import FinishReason
from sortserve.cost.model import CostModel
from sortserve.engine import ledger
from support.http_service import HttpService, make_service, parse_events
from support.scripted import EOS, FakeClock

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "api.md").read_text()
NAMED = set(re.findall(r"`([^`\n]+)`", PAGE))
"""What the page writes as code within a line."""


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in NAMED]


# ---- names ----


def error_classes(base: type[SortserveError] = SortserveError) -> Iterator[type[SortserveError]]:
    for child in base.__subclasses__():
        yield child
        yield from error_classes(child)


def codes_written_in_the_service() -> set[str]:
    sources = (ROOT / "server" / "sortserve" / "api").rglob("*.py")
    return {code for path in sources for code in re.findall(r'code="(\w+)"', path.read_text())}


def test_every_route_is_on_the_page() -> None:
    service = make_service(start=False)
    routes = [
        f"{method.upper()} {path}"
        for path, operations in service.app.openapi()["paths"].items()
        for method in operations
    ]

    assert len(routes) >= 13
    assert missing([*routes, "/docs", "/openapi.json"]) == []


@pytest.mark.parametrize(
    "model",
    [
        models.GenerateBody,
        models.CompletionBody,
        models.ChatCompletionBody,
        ResponsesBody,
        models.TokenizeBody,
        models.DetokenizeBody,
        models.StreamOptions,
        replies.BudgetReport,
        replies.ExitEntry,
        ServerStatus,
        replies.ModelResponse,
        replies.TokenizeResponse,
        replies.ErrorDetails,
    ],
)
def test_every_field_of_a_body_is_on_the_page(model: type[BaseModel]) -> None:
    assert missing(list(model.model_fields)) == []


def test_every_part_of_a_budget_is_on_the_page() -> None:
    assert missing([*BUDGET_FIELDS, *OnMiss, *parameters.BUDGET_HEADERS]) == []


def test_every_reason_to_finish_a_reply_is_on_the_page() -> None:
    reasons = [reason.value for reason in FinishReason if reason is not FinishReason.ERROR]

    assert missing(reasons) == []


def test_every_error_is_on_the_page_with_its_type_and_code() -> None:
    # What the command line alone raises has no type that a client could meet.
    by_http = [c for c in error_classes() if c.__name__ not in ("CheckpointError", "ConfigError")]
    codes = {c.default_code for c in by_http if c.default_code} | codes_written_in_the_service()
    states = set(get_args(ledger.State)) - {"ready"}  # they are the codes of a 503

    assert len(by_http) >= 9
    assert {"queue_full", "budget_unattainable", "model_not_found"} <= codes
    assert missing(sorted(codes | states)) == []
    assert missing(sorted({c.error_type for c in by_http})) == []
    assert missing(sorted({str(c.status) for c in by_http})) == []


def test_every_field_refused_by_name_is_on_the_page() -> None:
    assert missing(list(unsupported._HARMLESS_VALUES)) == []


# ---- examples ----

PROMPT, ANSWER = "Say hi.", "Hi!"
CREATED = 1764000000
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
LINE = {"prompt": PROMPT, "max_tokens": 8}


def spelling(clock: FakeClock) -> Callable[[Sequence[int], int], int]:
    """A model that spells the answer and takes a millisecond a layer."""

    def rule(tokens: Sequence[int], exit_layer: int) -> int:
        clock.now += exit_layer / 1e3
        num_output = len(tokens) - len(PROMPT)
        return ord(ANSWER[num_output]) if num_output < len(ANSWER) else EOS

    return rule


@contextmanager
def example_service() -> Iterator[HttpService]:
    clock = FakeClock()
    service = make_service(
        rule=spelling(clock), engine_options={"clock": clock, "min_quality": 0.5}
    )
    line = (0.0, 1e-3, 0.0, 0.0, 0.0)
    service.engine.costs.use(CostModel(line, line))
    try:
        yield service
    finally:
        service.worker.stop()


def at_fixed_time(reply: dict[str, Any]) -> dict[str, Any]:
    return {**reply, "created": CREATED} if "created" in reply else reply


def examples_on_page() -> list[Any]:
    """Each fenced JSON block as a value, each fenced stream as a list of its events."""
    found: list[Any] = []
    for kind, text in re.findall(r"^```(json|text)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if kind == "json":
            found.append(json.loads(text))
        elif text.startswith("data: "):
            found.append(parse_events(text + "\n"))
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/generate", {**LINE, "budget": {"latency_ms": 50}}, id="budget"),
        pytest.param(
            "/generate",
            {**LINE, "budget": {"latency_ms": 10, "on_miss": "reject"}},
            id="reject",
        ),
        pytest.param("/generate", {"prompt": PROMPT, "max_token": 5}, id="unknown field"),
        pytest.param("/tokenize", {"prompt": PROMPT, "return_token_strs": True}, id="tokenize"),
    ],
)
async def test_an_example_is_what_the_server_answers(path: str, body: dict[str, Any]) -> None:
    with example_service() as service:
        reply = await service.post(path, body, **{"x-request-id": "r1"})

    assert reply.json() in examples_on_page()


async def test_the_example_of_exits_is_what_the_server_answers() -> None:
    with example_service() as service:
        reply = await service.get("/exits")

    assert reply.json() in examples_on_page()


async def test_the_example_of_the_status_is_what_the_server_answers() -> None:
    with example_service() as service:
        await service.post("/generate", {**LINE, "budget": {"latency_ms": 50}})
        reply = await service.get("/status")

    assert reply.json() in examples_on_page()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/generate", {**LINE, "budget": {"exit_layer": 2}}, id="native"),
        pytest.param(
            "/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, id="chat"
        ),
        pytest.param("/v1/completions", {**LINE, "model": "tiny@4", "max_tokens": 2}, id="text"),
    ],
)
async def test_an_example_stream_is_what_the_server_sends(path: str, body: dict[str, Any]) -> None:
    with example_service() as service:
        reply = await service.post(path, {**body, "stream": True}, **{"x-request-id": "r1"})

    assert list(map(at_fixed_time, parse_events(reply.text))) in examples_on_page()
