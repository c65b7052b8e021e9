"""``/v1/responses``: one answer to a whole conversation, and nothing is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest

from support.http_service import MODEL, HttpService
from support.scripted import EOS, next_letter

RESPONSES = "/v1/responses"
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def to_c(tokens: Sequence[int], exit_layer: int) -> int:
    """Letters up to c, and the end."""
    return EOS if tokens[-1] == ord("c") else next_letter(tokens, exit_layer)


def client_of(service: HttpService) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="k", http_client=service.client(), max_retries=0
    )


async def events_of(service: HttpService, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = await service.post(RESPONSES, {**body, "stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = []
    for frame in reply.text.removesuffix("\n\n").split("\n\n"):
        kind, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_openais_client_reads_the_answer(make: Callable[..., HttpService]) -> None:
    client = client_of(make(rule=to_c))

    response = await client.responses.create(
        model=MODEL, input="a", instructions="Be brief.", store=False, metadata={"a": "b"}
    )

    assert response.output_text == "bc"
    assert response.status == "completed"
    assert response.error is None
    assert response.incomplete_details is None
    assert response.id.startswith("resp_")
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert response.usage.input_tokens == len("Be brief.a")
    assert response.usage.output_tokens == 3
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.budget["exit_layer"] == 6


async def test_openais_client_reads_the_stream(make: Callable[..., HttpService]) -> None:
    client = client_of(make(rule=to_c))

    async with client.responses.stream(model=MODEL, input="a") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()

    assert kinds == [*EVENTS, "response.completed"]
    assert final.output_text == "bc"
    assert final.status == "completed"


async def test_a_conversation_goes_on_with_the_answers_of_earlier_responses(
    make: Callable[..., HttpService],
) -> None:
    client = client_of(make(rule=to_c))
    asked: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]
    first = await client.responses.create(model=MODEL, input=asked)
    asked += [item.model_dump() for item in first.output]

    second = await client.responses.create(
        model=MODEL, input=[*asked, {"role": "user", "content": "b"}]
    )

    assert second.usage is not None
    assert second.usage.input_tokens == len("abcb")
    assert second.output_text == "c"


async def test_the_stream_ends_with_what_the_whole_reply_says(shared: HttpService) -> None:
    body = {"input": "a", "max_output_tokens": 2, "top_logprobs": 1, "budget": {"exit_layer": 4}}

    whole = (await shared.post(RESPONSES, body)).json()
    *events, last = await events_of(shared, body)

    assert [event["type"] for event in events] == EVENTS
    assert last["type"] == "response.incomplete"
    assert last["response"].keys() == whole.keys()
    for name in whole.keys() - {"id", "created_at", "output", "budget", "usage"}:
        assert last["response"][name] == whole[name]
    [message], [said] = whole["output"], last["response"]["output"]
    assert said["content"] == message["content"]
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["budget"]["tokens_by_exit"] == {"4": 2}
    entries = message["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["b", "c"]
    deltas = [event for event in events if event["type"] == EVENTS[4]]
    assert [entry for delta in deltas for entry in delta["logprobs"]] == entries
    assert "".join(delta["delta"] for delta in deltas) == message["content"][0]["text"] == "bc"


async def test_headers_and_model_names_say_the_depth_as_elsewhere(shared: HttpService) -> None:
    body = {"input": "a", "max_output_tokens": 1, "model": f"{MODEL}@2"}

    reply = await shared.post(RESPONSES, body, **{"x-slo-ttft-ms": "60000"})

    assert reply.headers["x-exit-layer"] == "2"
    assert reply.headers["x-budget-met"] == "true"
    assert reply.json()["model"] == f"{MODEL}@2"


async def test_log_probabilities_may_be_asked_for_by_include(shared: HttpService) -> None:
    body = {"input": "a", "max_output_tokens": 1, "include": ["message.output_text.logprobs"]}

    reply = (await shared.post(RESPONSES, body)).json()

    [entry] = reply["output"][0]["content"][0]["logprobs"]
    assert entry["logprob"] == -1.0
    assert entry["top_logprobs"] == []


async def test_a_failed_step_is_an_error_of_the_stream(make: Callable[..., HttpService]) -> None:
    service = make()
    service.runner.fail_next = True
    [event] = await events_of(service, {"input": "a"})

    assert event["type"] == "error"
    assert event["error"]["type"] == "internal_error"


async def test_openais_client_raises_for_a_failed_stream(
    make: Callable[..., HttpService],
) -> None:
    service = make()
    service.runner.fail_next = True

    with pytest.raises(openai.APIError):
        async for _ in await client_of(service).responses.create(
            model=MODEL, input="a", stream=True
        ):
            pass


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input.0"),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0.type"),
        (
            {"text": {"format": {"type": "json_object"}}, "guided_regex": "a"},
            "text.format",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": "a" * 300}, "input"),
        ({"input": "a", "instructions": "a" * 300}, "input"),
        ({"latency_ms": 5}, "latency_ms"),
        ({"budget": {"exit_layer": 3}}, "budget.exit_layer"),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(
    shared: HttpService, fields: dict[str, Any], param: str
) -> None:
    reply = await shared.post(RESPONSES, {"input": "a", **fields})

    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


async def test_no_response_is_kept_and_no_embedding_is_made(shared: HttpService) -> None:
    made = (await shared.post(RESPONSES, {"input": "a", "max_output_tokens": 1})).json()

    kept = await shared.get(f"{RESPONSES}/{made['id']}")
    embedding = await shared.post("/v1/embeddings", {"model": MODEL, "input": "a"})

    assert kept.status_code == 404
    assert embedding.status_code == 404
    assert embedding.json()["error"]["code"] == "not_found"
    assert "/v1/embeddings" in embedding.json()["error"]["message"]
