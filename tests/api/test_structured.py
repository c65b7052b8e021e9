"""Structured outputs over HTTP, in every dialect, with a real tiny model behind it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.checkpoint.load import load_checkpoint
from sortserve.engine.assemble import EngineOptions, assemble
from sortserve.engine.worker import EngineWorker
from support.schemas import FIVE_FIELDS, check_document
from support.tiny_models import make_tiny_checkpoint

CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
CHOICES = ["yes", "no", "perhaps"]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("structured"), exits=(2, 4, 6))
    checkpoint = load_checkpoint(str(path), dtype="float32", device="cpu")
    parts = assemble(checkpoint, EngineOptions(block_size=4, seed=0, min_quality=0.0))
    worker = EngineWorker(parts.engine, debug=True)
    worker.start()
    settings = ApiSettings(served_model_name="tiny", structured_min_quality=0.5)
    yield create_app(worker, parts.tokenizer, settings)
    worker.stop()


@pytest.fixture
async def client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def asking(route: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": "the"}
    if route == CHAT:
        prompt = {"messages": [{"role": "user", "content": "the"}]}
    return {**prompt, "max_tokens": 150, "seed": 7, **fields}


def text_of(route: str, reply: httpx.Response) -> tuple[str, str]:
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    text = choice["message"]["content"] if route == CHAT else choice["text"]
    return text, choice["finish_reason"]


def schema_format(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    described = {"name": "person", "schema": schema, **fields}
    return {"type": "json_schema", "json_schema": described}


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, {"response_format": schema_format(FIVE_FIELDS, strict=True)}),
        (CHAT, {"response_format": schema_format(FIVE_FIELDS)}),
        (COMPLETIONS, {"response_format": schema_format(FIVE_FIELDS)}),
        (CHAT, {"structured_outputs": {"json": FIVE_FIELDS}}),
        (CHAT, {"response_format": {"type": "json_object", "schema": FIVE_FIELDS}}),
        (COMPLETIONS, {"guided_json": FIVE_FIELDS}),
        (CHAT, {"guided_json": json.dumps(FIVE_FIELDS)}),
        (NATIVE, {"format": {"json": FIVE_FIELDS}}),
        (NATIVE, {"format": schema_format(FIVE_FIELDS)}),
    ],
)
async def test_a_schema_in_every_dialect_gives_the_same_valid_document(
    client: httpx.AsyncClient, route: str, fields: dict[str, Any]
) -> None:
    text, reason = text_of(route, await client.post(route, json=asking(route, **fields)))

    assert reason == "stop"
    check_document(text, FIVE_FIELDS)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}}, "[a-f]{3}-[0-9]{2}"),
        ({"guided_regex": "[a-f]{3}-[0-9]{2}"}, "[a-f]{3}-[0-9]{2}"),
        ({"structured_outputs": {"choice": CHOICES}}, "yes|no|perhaps"),
        ({"guided_choice": CHOICES}, "yes|no|perhaps"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b" root'}}, "b*a"),
        ({"guided_grammar": 'start: "x" | "y"'}, "x|y"),
    ],
)
async def test_other_formats_are_kept(
    client: httpx.AsyncClient, fields: dict[str, Any], pattern: str
) -> None:
    text, reason = text_of(CHAT, await client.post(CHAT, json=asking(CHAT, **fields)))

    assert reason == "stop"
    assert re.fullmatch(pattern, text)


async def test_json_object_begins_an_object_and_text_asks_for_nothing(
    client: httpx.AsyncClient,
) -> None:
    anything = {"response_format": {"type": "json_object"}, "max_tokens": 20}
    text, _ = text_of(CHAT, await client.post(CHAT, json=asking(CHAT, **anything)))
    assert text.startswith("{")

    plain = asking(CHAT, max_tokens=20)
    said = {**plain, "response_format": {"type": "text"}}
    replies = [text_of(CHAT, await client.post(CHAT, json=body)) for body in (plain, said)]
    assert replies[0] == replies[1]


async def test_a_document_that_is_cut_says_so(client: httpx.AsyncClient) -> None:
    body = asking(CHAT, response_format=schema_format(FIVE_FIELDS), max_tokens=12)

    text, reason = text_of(CHAT, await client.post(CHAT, json=body))

    assert reason == "length"
    assert text.startswith('{"name": "')


async def test_a_stream_gives_the_same_text(client: httpx.AsyncClient) -> None:
    body = asking(CHAT, response_format=schema_format(FIVE_FIELDS))
    whole, _ = text_of(CHAT, await client.post(CHAT, json=body))

    reply = await client.post(CHAT, json={**body, "stream": True})

    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for e in events for choice in json.loads(e)["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == whole


async def test_log_probabilities_come_for_every_token_and_change_none(
    client: httpx.AsyncClient,
) -> None:
    body = asking(CHAT, response_format=schema_format(FIVE_FIELDS), return_token_ids=True)
    [plain] = (await client.post(CHAT, json=body)).json()["choices"]

    with_logprobs = {**body, "logprobs": True, "top_logprobs": 2}
    [choice] = (await client.post(CHAT, json=with_logprobs)).json()["choices"]

    assert choice["token_ids"] == plain["token_ids"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == len(choice["token_ids"])
    assert all(entry["logprob"] <= 0.0 for entry in entries)


async def test_n_samples_differ_and_are_all_valid(client: httpx.AsyncClient) -> None:
    body = asking(CHAT, response_format=schema_format(FIVE_FIELDS), n=4)

    choices = (await client.post(CHAT, json=body)).json()["choices"]

    texts = [choice["message"]["content"] for choice in choices]
    for text in texts:
        check_document(text, FIVE_FIELDS)
    assert len(set(texts)) == 4


async def test_penalties_bias_and_min_tokens_go_with_a_grammar(client: httpx.AsyncClient) -> None:
    fields = {
        "response_format": schema_format(FIVE_FIELDS),
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "logit_bias": {"94": 100},  # "|"
        "min_tokens": 140,
        "top_p": 0.9,
        "top_k": 20,
    }

    text, reason = text_of(CHAT, await client.post(CHAT, json=asking(CHAT, **fields)))

    assert reason == "stop"
    check_document(text, FIVE_FIELDS)


@pytest.mark.parametrize(
    ("route", "fields", "param", "words"),
    [
        (
            CHAT,
            {"response_format": schema_format({"properties": {"a": {"uniqueItems": True}}})},
            "response_format.json_schema.schema.properties.a",
            "uniqueItems",
        ),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "name"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "JSON schema",
        ),
        (CHAT, {"structured_outputs": {"structural_tag": "x"}}, None, "structural_tag"),
        (CHAT, {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "one of"),
        (CHAT, {"guided_regex": "("}, "guided_regex", "unclosed group"),
        (CHAT, {"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "Drop one"),
        (CHAT, {"guided_choice": [""]}, "guided_choice", "not empty"),
        (CHAT, {"structured_outputs": {"choice": []}}, "structured_outputs.choice", "a list of 1"),
        (CHAT, {"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "not empty"),
        (NATIVE, {"format": {"grammar": ""}}, "format.grammar", "not empty"),
        (CHAT, {"guided_json": "{"}, "guided_json", "not valid JSON"),
        (CHAT, {"guided_json": []}, "guided_json", "an object"),
        (CHAT, {"guided_json": False}, "guided_json", "an object"),
        (CHAT, {"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
        (NATIVE, {"format": {"json": {"type": "nothing"}}}, "format.json", "Invalid type"),
        (NATIVE, {"format": {"xml": 1}}, "format.xml", "regex"),
    ],
)
async def test_what_cannot_be_kept_is_refused_with_its_place(
    client: httpx.AsyncClient, route: str, fields: dict[str, Any], param: str | None, words: str
) -> None:
    reply = await client.post(route, json=asking(route, **fields))

    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param


async def test_a_structured_request_has_a_floor_of_its_own(client: httpx.AsyncClient) -> None:
    """Half of the quality: exit 2 has a third of it, exit 4 two thirds."""
    exits = (await client.get("/exits")).json()["exits"]
    cheapest = next(entry for entry in exits if entry["exit_layer"] == 2)["compute"]

    async def exit_of(budget: dict[str, Any], **fields: Any) -> Any:
        reply = await client.post(NATIVE, json=asking(NATIVE, budget=budget, **fields))
        return reply.json().get("budget", reply.json().get("error"))

    cheap, form = {"compute": cheapest + 0.001}, {"format": {"choice": CHOICES}}
    assert (await exit_of(cheap))["exit_layer"] == 2
    assert "leaves no exit" in (await exit_of(cheap, **form))["message"]
    assert (await exit_of({**cheap, "min_quality": 0}, **form))["exit_layer"] == 2
    assert (await exit_of({"exit_layer": 2}, **form))["exit_layer"] == 2


TOOLS = [
    {"type": "function", "function": {"name": "clock"}},
    {"type": "function", "function": {"name": "person", "parameters": FIVE_FIELDS}},
]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "person"}}]
)
async def test_a_call_that_must_come_is_valid_and_streams_the_same(
    client: httpx.AsyncClient, choice: Any
) -> None:
    tools = TOOLS[1:] if choice == "required" else TOOLS
    fields = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    body = asking(CHAT, **fields)
    [whole] = (await client.post(CHAT, json=body)).json()["choices"]

    reply = await client.post(CHAT, json={**body, "stream": True})

    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    [call] = whole["message"]["tool_calls"]
    assert call["function"]["name"] == "person"
    check_document(call["function"]["arguments"], FIVE_FIELDS)
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line[:7] == "data: {"]
    choices = [choice for event in events for choice in event["choices"]]
    calls = [call for c in choices for call in c["delta"].get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "person"
    assert "".join(c["function"]["arguments"] for c in calls) == call["function"]["arguments"]
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_the_responses_api_takes_a_schema_too(client: httpx.AsyncClient) -> None:
    text = {"format": {"type": "json_schema", "name": "person", "schema": FIVE_FIELDS}}
    body = {"input": "the", "text": text, "max_output_tokens": 150, "seed": 7}

    reply = await client.post("/v1/responses", json=body)

    assert reply.status_code == 200, reply.text
    assert reply.json()["text"] == text
    [part] = reply.json()["output"][0]["content"]
    assert reply.json()["status"] == "completed"
    check_document(part["text"], FIVE_FIELDS)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "person"}])
async def test_the_responses_api_forces_calls_too_and_streams_the_same(
    client: httpx.AsyncClient, choice: Any
) -> None:
    tools = [{"type": "function", "name": "person", "parameters": FIVE_FIELDS}]
    body = {
        "input": "the",
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_output_tokens": 150,
        "seed": 7,
    }

    whole = (await client.post("/v1/responses", json=body)).json()
    stream = await client.post("/v1/responses", json={**body, "stream": True})

    [call] = whole["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "person", "completed")
    check_document(call["arguments"], FIVE_FIELDS)
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line[:6] == "data: "]
    deltas = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call["arguments"]
    [last] = events[-1]["response"]["output"]
    assert last["arguments"] == call["arguments"]
