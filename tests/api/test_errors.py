"""Every wrong request is answered with a status, a sentence and the field's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Any

import httpx
import pytest

from sortserve.api.problems import error_response
from sortserve.core.errors import (
    AuthenticationError,
    BudgetUnattainableError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    RequestTimeoutError,
    SortserveError,
    UnavailableError,
)
from support.http_service import HttpService, as_json

GENERATE = "/generate"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BASE: dict[str, dict[str, Any]] = {
    GENERATE: {"prompt": "a", "max_tokens": 1},
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}


def problem(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a reply, whose body must be OpenAI's."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"].endswith((".", "?"))
    return error


WRONG_FIELDS = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 10**400}, "top_p"),
    ({"top_k": 10**400}, "top_k"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 10**400}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"5": "much"}}, "logit_bias.5"),
    ({"logit_bias": {"5": 10**400}}, "logit_bias.5"),
    ({"logit_bias": {"128": 1}}, "logit_bias.128"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 5]}, "stop.1"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": {}}, "stop"),
    ({"stop_token_ids": [1, "x"]}, "stop_token_ids.1"),
    ({"stop_token_ids": [1, 128]}, "stop_token_ids.1"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stream": "true"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ({"request_id": "no spaces"}, "request_id"),
    ({"request_id": "line\n"}, "request_id"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"budget": 5}, "budget"),
    ({"budget": {"exit": 2}}, "budget.exit"),
    ({"budget": {"exit_layer": 3}}, "budget.exit_layer"),
    ({"budget": {"exit_layer": "2"}}, "budget.exit_layer"),
    ({"budget": {"exit_layer": 2, "compute": 0.5}}, "budget.compute"),
    ({"budget": {"latency_ms": 0}}, "budget.latency_ms"),
    ({"budget": {"latency_ms": 86_400_001}}, "budget.latency_ms"),
    ({"budget": {"ttft_ms": True}}, "budget.ttft_ms"),
    ({"budget": {"tpot_ms": "5"}}, "budget.tpot_ms"),
    ({"budget": {"compute": 1.5}}, "budget.compute"),
    ({"budget": {"compute": 0.01}}, "budget.compute"),
    ({"budget": {"min_exit_layer": 7}}, "budget.min_exit_layer"),
    ({"budget": {"min_quality": -1}}, "budget.min_quality"),
    ({"budget": {"on_miss": "x" * 5000}}, "budget.on_miss"),
    ({"budget": {"ttft_ms": 9, "latency_ms": 5}}, "budget.ttft_ms"),
    ({"model": 5}, "model"),
    ({"model": "tiny@2", "budget": {"exit_layer": 4}}, "budget.exit_layer"),
    ({"model": "tiny@2", "budget": {"compute": 0.9}}, "budget.compute"),
    ({"model": "tiny@2", "budget": {"min_exit_layer": 2}}, "budget.min_exit_layer"),
    ({"model": "tiny@2", "budget": {"min_quality": 0.1}}, "budget.min_quality"),
]


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fields", "param"), WRONG_FIELDS)
async def test_a_wrong_field_is_refused_by_name(
    shared: HttpService, path: str, fields: dict[str, Any], param: str
) -> None:
    error = problem(await shared.post(path, {**BASE[path], **fields}))

    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[-1] in error["message"]
    assert len(error["message"]) < 1010


NUMBERS = [
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "n", "stop_token_ids.0", "logit_bias.5"),
    *("budget.latency_ms", "budget.ttft_ms", "budget.tpot_ms", "budget.compute"),
    *("budget.exit_layer", "budget.min_exit_layer", "budget.min_quality"),
]
NUMBERS_OF_ONE_ROUTE = [
    (GENERATE, "logprobs"),
    (GENERATE, "prompt.0"),
    (COMPLETIONS, "logprobs"),
    (COMPLETIONS, "best_of"),
    (COMPLETIONS, "prompt.0"),
    (COMPLETIONS, "prompt.0.0"),
    (CHAT, "top_logprobs"),
    (CHAT, "max_completion_tokens"),
]


def nested(path: Sequence[str], value: object) -> Any:
    """The value below the fields and list indices of a dotted path."""
    if not path:
        return value
    inside = nested(path[1:], value)
    return [inside] if path[0] == "0" else {path[0]: inside}


@pytest.mark.parametrize(
    ("path", "param"),
    [
        *((path, name) for path in (GENERATE, COMPLETIONS, CHAT) for name in NUMBERS),
        *NUMBERS_OF_ONE_ROUTE,
    ],
)
async def test_no_number_is_too_large_to_be_refused_by_name(
    shared: HttpService, path: str, param: str
) -> None:
    base = {**BASE[path]}
    if param == "max_completion_tokens":
        del base["max_tokens"]
    if param == "top_logprobs":
        base["logprobs"] = True
    for digits in (19, 309, 310, 4300):
        for value in (int("9" * digits), -int("9" * digits)):
            if param == "top_k" and value > 0:
                continue  # more than the vocabulary has: every token
            body = {**base, **nested(param.split("."), value)}
            error = problem(await shared.post(path, body))
            assert error["param"] == param
            assert len(error["message"]) < 1010


WRONG_PROMPTS: list[tuple[str, dict[str, Any], str]] = [
    (GENERATE, {"prompt": None}, "prompt"),
    (GENERATE, {"messages": [{"role": "user", "content": "a"}]}, "prompt"),
    (GENERATE, {"prompt": 5}, "prompt"),
    (GENERATE, {"prompt": ["a", "b"]}, "prompt.0"),
    (GENERATE, {"prompt": []}, "prompt"),
    (GENERATE, {"prompt": ""}, "prompt"),
    (GENERATE, {"prompt": [1, 128]}, "prompt.1"),
    (GENERATE, {"prompt": [1, True]}, "prompt.1"),
    (GENERATE, {"prompt": [1, -1]}, "prompt.1"),
    (GENERATE, {"prompt": "a" * 256}, "prompt"),
    (GENERATE, {"add_generation_prompt": True}, "add_generation_prompt"),
    (GENERATE, {"max_token": 5}, "max_token"),
    (GENERATE, {"logprobs": 21}, "logprobs"),
    (GENERATE, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": {}}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt.1"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt.1"),
    (COMPLETIONS, {"prompt": ["a", ""], "echo": True, "logprobs": 1}, "prompt.1"),
    (COMPLETIONS, {"prompt": ["a", "a" * 300]}, "prompt.1"),
    (COMPLETIONS, {"prompt": [[1], [2, "x"]]}, "prompt.1.1"),
    (COMPLETIONS, {"prompt": ["a"] * 201}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 101, "n": 2}, "n"),
    (COMPLETIONS, {"prompt": "a" * 256}, "prompt"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 0, "logprobs": 1, "echo": False}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": -1, "echo": True}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 0, "min_tokens": 2, "echo": True}, "min_tokens"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"suffix": "end"}, "suffix"),
    (COMPLETIONS, {"use_beam_search": True}, "use_beam_search"),
    (COMPLETIONS, {"service_tier": "gold"}, "service_tier"),
    (COMPLETIONS, {"exit_layer": 2}, "exit_layer"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": ["hi"]}, "messages.0"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages.0.tool_calls.0",
    ),
    (CHAT, {"messages": [{"role": "alien", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 256}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, "messages"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    (CHAT, {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
    (CHAT, {"priority": 101}, "priority"),
    (CHAT, {"priority": 1.5}, "priority"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools.0.function"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": 3}, "tool_choice"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"max_completion_tokens": 2}, "max_completion_tokens"),
    (CHAT, {"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_tokens": None, "max_completion_tokens": 999}, "max_completion_tokens"),
]


@pytest.mark.parametrize(("path", "fields", "param"), WRONG_PROMPTS)
async def test_what_only_one_route_has_is_refused_by_name_too(
    shared: HttpService, path: str, fields: dict[str, Any], param: str
) -> None:
    error = problem(await shared.post(path, {**BASE[path], **fields}))

    assert error["param"] == param
    assert error["message"]


async def test_a_prompt_over_the_context_is_told_both_numbers(shared: HttpService) -> None:
    prompt = problem(await shared.post(GENERATE, {"prompt": "a" * 300}))
    limit = problem(await shared.post(GENERATE, {"prompt": "a" * 200, "max_tokens": 100}))

    assert "300" in prompt["message"]
    assert "256" in prompt["message"]
    assert "max_tokens=100" in limit["message"]
    assert "56" in limit["message"]


async def test_an_unknown_field_gets_a_suggestion(shared: HttpService) -> None:
    close = problem(await shared.post(GENERATE, {"prompt": "a", "max_token": 5}))
    far = problem(await shared.post(GENERATE, {"prompt": "a", "zzz": 5}))

    assert "did you mean max_tokens?" in close["message"]
    assert "prompt, messages" in far["message"]


async def test_errors_use_the_names_that_the_request_used(shared: HttpService) -> None:
    body = {**BASE[CHAT], "max_tokens": None, "max_completion_tokens": 999}

    error = problem(await shared.post(CHAT, body))

    assert "max_completion_tokens=999" in error["message"]


@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms"])
@pytest.mark.parametrize(
    "value",
    ["soon", "-1", "0", "nan", "inf", "", "1_0", "86400001", "1e400", "9" * 310, "9" * 5000],
)
async def test_a_wrong_budget_header_is_refused_by_name_with_both_bounds(
    shared: HttpService, header: str, value: str
) -> None:
    error = problem(await shared.post(CHAT, BASE[CHAT], **{header: value}))

    assert error["param"] == header
    assert error["message"].endswith("a number of milliseconds above 0, to 86400000.")


@pytest.mark.parametrize("model", ["other", "tiny@3", "tiny@", "tiny@02", "TINY", "", "tiny@2@2"])
@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
async def test_an_unknown_model_is_not_found(shared: HttpService, path: str, model: str) -> None:
    error = problem(await shared.post(path, {**BASE[path], "model": model}), 404)

    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "[2, 4, 6]" in error["message"]


async def test_an_unknown_model_has_no_entry(shared: HttpService) -> None:
    error = problem(await shared.get("/v1/models/other"), 404)

    assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b'{"prompt": NaN}x', id="more after the end"),
        pytest.param(b"\xff\xfe", id="no UTF-8"),
        pytest.param(b'{"prompt": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b"[" * 100_000, id="too deep"),
        pytest.param(b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", id="a huge number"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'"text"', id="a string"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"prompt": "a", "temperature": NaN}', id="no number"),
        pytest.param(b'{"prompt": "a", "temperature": 1e999}', id="infinity"),
    ],
)
@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
async def test_a_body_that_is_no_request_is_refused(
    shared: HttpService, path: str, content: bytes
) -> None:
    async with shared.client() as client:
        headers = {"content-type": "application/json"}
        problem(await client.post(path, content=content, headers=headers))


@pytest.mark.parametrize("path", [GENERATE, "/tokenize", "/detokenize"])
async def test_of_many_unknown_fields_the_first_is_named(shared: HttpService, path: str) -> None:
    body = {f"x{i}": i for i in range(100_000)} | BASE.get(path, {})

    error = problem(await shared.post(path, body))

    assert error["param"] == "x0"
    assert error["message"].startswith("x0 is not a field here")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_only_json_is_read(shared: HttpService, kind: str | None) -> None:
    async with shared.client() as client:
        headers = {} if kind is None else {"content-type": kind}
        reply = await client.post(GENERATE, content=as_json(BASE[GENERATE]), headers=headers)

    assert "Content-Type: application/json" in problem(reply)["message"]


async def test_json_with_a_charset_is_json(shared: HttpService) -> None:
    async with shared.client() as client:
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        reply = await client.post(GENERATE, content=as_json(BASE[GENERATE]), headers=headers)

    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidRequestError, "false"),
        (AuthenticationError, "false"),
        (NotFoundError, "false"),
        (PayloadTooLargeError, "false"),
        (BudgetUnattainableError, "false"),
        (RequestTimeoutError, "false"),
        (OverloadedError, None),
        (UnavailableError, None),
        (EngineError, None),
    ],
)
def test_what_would_fail_again_says_so(error: type[SortserveError], told: str | None) -> None:
    assert error_response(error("No.")).headers.get("x-should-retry") == told


@pytest.mark.parametrize(
    ("predicted_s", "header"),
    [(None, "1"), (0.0, "1"), (-3.0, "1"), (2.1, "3"), (5e9, "3600"), (inf, "3600"), (nan, "1")],
)
def test_no_prediction_makes_a_time_to_come_back_that_is_none(
    predicted_s: float | None, header: str
) -> None:
    reply = error_response(OverloadedError("No.", retry_after_s=predicted_s))

    assert reply.headers["retry-after"] == header


async def test_an_unknown_route_is_not_found(shared: HttpService) -> None:
    error = problem(await shared.get("/nothing/here"), 404)

    assert (error["type"], error["code"]) == ("not_found_error", "not_found")
    assert "/nothing/here" in error["message"]


async def test_a_wrong_method_is_told_the_right_one(shared: HttpService) -> None:
    reply = await shared.get(GENERATE)

    problem(reply, 405)
    assert reply.headers["allow"] == "POST"


async def test_a_failed_step_is_a_500_in_the_same_body(service: HttpService) -> None:
    service.runner.fail_next = True

    error = problem(await service.post(GENERATE, BASE[GENERATE]), 500)
    after = await service.post(GENERATE, BASE[GENERATE])

    assert error["type"] == "internal_error"
    assert after.status_code == 200


async def test_an_unexpected_error_is_a_500_that_tells_nothing_of_the_inside(
    make: Callable[..., HttpService], caplog: pytest.LogCaptureFixture
) -> None:
    service = make()

    def explode(text: str, add_special_tokens: bool = True) -> list[int]:
        raise RuntimeError("secret detail")

    service.tokenizer.encode = explode  # type: ignore[method-assign]

    error = problem(await service.post(GENERATE, BASE[GENERATE]), 500)

    assert "secret" not in error["message"]
    assert "secret detail" in caplog.text


async def test_the_places_of_refused_requests_are_given_back(
    make: Callable[..., HttpService],
) -> None:
    service = make(worker_options={"max_num_queued_reqs": 200}, max_n=200)
    full = {**BASE[COMPLETIONS], "prompt": ["a"] * 100, "n": 2}

    for path, fields, _ in WRONG_PROMPTS:
        problem(await service.post(path, {**BASE[path], **fields}))

    # Aborts of what had been submitted reach the engine before this request does.
    await service.post(GENERATE, BASE[GENERATE])

    assert (await service.post(COMPLETIONS, full)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "a" * 256}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * 300}, "prompt"),
        (COMPLETIONS, {"prompt": "a" * 200, "max_tokens": 57}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a" * 100_000}, "prompt"),
        (COMPLETIONS, {"prompt": "a" * 600_000}, "prompt"),
        ("/generate", {"prompt": "a" * 256}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 256}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 100_000}]}, "messages"),
        ("/v1/responses", {"input": "a" * 256}, "input"),
    ],
)
async def test_what_the_context_cannot_hold_has_openais_code(
    shared: HttpService, path: str, body: dict[str, Any], param: str
) -> None:
    """By it clients know that a shorter conversation would do."""
    reply = await shared.post(path, body)

    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert reply.json()["error"]["param"] == param
