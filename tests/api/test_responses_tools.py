"""Functions on ``/v1/responses``: what is called, in which events, and how a client goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from support.http_service import MODEL, HttpService
from support.scripted import EOS

RESPONSES = "/v1/responses"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "parameters": CITY}
CLOCK = {"type": "function", "name": "clock"}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
OTHER = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'


def says(text: str) -> Callable[..., int]:
    """A model that writes a text after a prompt of one token, and ends."""

    def rule(tokens: Any, exit_layer: int) -> int:
        at = len(tokens) - 1
        return ord(text[at]) if at < len(text) else EOS

    return rule


@pytest.fixture
def make_hermes(make: Callable[..., HttpService]) -> Callable[[str], HttpService]:
    """Makes services with a model that knows tools, and writes a text."""

    def make_one(text: str) -> HttpService:
        service = make(rule=says(text))
        service.tokenizer.tool_dialect = "hermes"
        return service

    return make_one


def asking(**fields: Any) -> dict[str, Any]:
    return {"input": "a", "tools": [CLOCK, WEATHER], "max_output_tokens": 200, **fields}


async def events_of(service: HttpService, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = await service.post(RESPONSES, {**body, "stream": True})
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line[:6] == "data: "]


async def test_a_call_of_the_models_own_accord_is_an_item_after_its_text(
    make_hermes: Callable[[str], HttpService],
) -> None:
    service = make_hermes("Let me see. " + CALL + "\n" + OTHER)

    reply = (await service.post(RESPONSES, asking())).json()

    message, weather, clock = reply["output"]
    assert reply["status"] == "completed"
    assert message["content"][0]["text"] == "Let me see. "
    assert weather["type"] == "function_call"
    assert (weather["name"], weather["arguments"]) == ("weather", '{"city": "Rome"}')
    assert (clock["name"], clock["arguments"]) == ("clock", "{}")
    assert {item["status"] for item in reply["output"]} == {"completed"}
    assert len({item["id"] for item in reply["output"]}) == 3
    assert weather["call_id"] != clock["call_id"]
    assert reply["tool_choice"] == "auto"
    assert [tool["name"] for tool in reply["tools"]] == ["clock", "weather"]


async def test_a_stream_has_the_events_of_each_item(
    make_hermes: Callable[[str], HttpService],
) -> None:
    service = make_hermes("Ah" + CALL)

    events = await events_of(service, asking())

    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    added, delta, done, item_done, last = events[-5:]
    assert added["output_index"] == delta["output_index"] == done["output_index"] == 1
    assert added["item"]["id"] == delta["item_id"] == done["item_id"] == item_done["item"]["id"]
    assert (added["item"]["arguments"], added["item"]["status"]) == ("", "in_progress")
    assert done["arguments"] == delta["delta"] == '{"city": "Rome"}'
    assert last["response"]["output"][1] == item_done["item"]


@pytest.mark.parametrize(
    "text",
    [
        "It rains.",
        "",
        "  ",
        CALL,
        f"\n{CALL}\n",
        f"a{CALL}b",
        f"{CALL} and {OTHER}",
        "<tool_call>{",
    ],
)
async def test_the_whole_reply_has_the_items_that_its_stream_ends_with(
    make_hermes: Callable[[str], HttpService], text: str
) -> None:
    body = asking(top_logprobs=0, include=["message.output_text.logprobs"])

    whole = (await make_hermes(text).post(RESPONSES, body)).json()
    streamed = (await events_of(make_hermes(text), body))[-1]["response"]

    def without_ids(response: dict[str, Any]) -> list[Any]:
        items = [{**item, "id": None, "call_id": None} for item in response["output"]]
        return [*items, response["status"], response["tools"]]

    assert without_ids(whole) == without_ids(streamed)
    texts = [p["text"] for item in whole["output"] for p in item.get("content", ())]
    said = [p["logprobs"] for item in whole["output"] for p in item.get("content", ())]
    if "<" not in text:  # then every token but the last made a letter
        assert texts == [text]
        assert len(said[0]) == len(text) + 1


async def test_openais_client_reads_calls_and_streams(
    make_hermes: Callable[[str], HttpService],
) -> None:
    service = make_hermes(CALL)
    client = openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="k", http_client=service.client(), max_retries=0
    )
    tools: Any = [{**WEATHER, "strict": True}]

    parsed = await client.responses.parse(model=MODEL, input="a", tools=tools)
    async with client.responses.stream(model=MODEL, input="a", tools=tools) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()

    assert parsed.output[0].type == "function_call"
    assert "response.function_call_arguments.done" in kinds
    [call] = final.output
    assert call.type == "function_call"
    assert call.arguments == '{"city": "Rome"}'


async def test_a_conversation_goes_on_with_calls_and_their_outputs(
    make: Callable[..., HttpService], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()
    seen: list[Any] = []
    template = service.tokenizer.apply_chat_template

    def note(messages: list[dict[str, Any]], *args: Any, **variables: Any) -> list[int]:
        seen.extend([messages, variables.get("tools")])
        return template(messages, *args, **variables)

    monkeypatch.setattr(service.tokenizer, "apply_chat_template", note)
    call = {"type": "function_call", "id": "fc_1", "status": "completed", "name": "weather"}
    items = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": "b"},
        {**call, "call_id": "call_1", "arguments": '{"city": "Rome"}'},
        {**call, "call_id": "call_2", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "c"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "d"}],
        },
    ]

    reply = await service.post(RESPONSES, asking(input=items, tool_choice="none"))

    assert reply.status_code == 200, reply.text
    user, assistant, first, second = seen[0]
    assert user == {"role": "user", "content": "a"}
    assert assistant["content"] == "b"
    assert [c["id"] for c in assistant["tool_calls"]] == ["call_1", "call_2"]
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert (first["role"], first["tool_call_id"], first["content"]) == ("tool", "call_1", "c")
    assert second["content"] == [{"type": "text", "text": "d"}]
    assert first["name"] == "weather"
    assert seen[1] is None


async def test_an_answer_that_is_cut_leaves_its_last_item_incomplete(
    make_hermes: Callable[[str], HttpService],
) -> None:
    service = make_hermes(CALL + "and so on")

    reply = (await service.post(RESPONSES, asking(max_output_tokens=len(CALL) + 3))).json()

    assert reply["status"] == "incomplete"
    assert [item["status"] for item in reply["output"]] == ["completed", "incomplete"]
    assert reply["output"][1]["content"][0]["text"] == "and"


async def test_a_forced_call_has_no_text_for_a_format(shared: HttpService) -> None:
    named = {"type": "function", "name": "clock"}
    text = {"format": {"type": "json_object"}}

    reply = (await shared.post(RESPONSES, asking(tool_choice=named, text=text))).json()

    assert [item["type"] for item in reply["output"]] == ["function_call"]


OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "c"}
EARLIER = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": []}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tools": [{"type": "mcp"}], "tool_choice": "required"}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        ({"input": [OUTPUT]}, "input.0.call_id"),
        ({"input": [EARLIER, {**OUTPUT, "output": 5}]}, "input.1.output"),
        ({"input": [{**EARLIER, "call_id": None}]}, "input.0.call_id"),
        ({"input": [{**EARLIER, "name": ""}]}, "input.0.name"),
        ({"input": [{**EARLIER, "arguments": {}}]}, "input.0.arguments"),
        ({"input": [EARLIER, OUTPUT, {"role": "user", "content": 5}]}, "input.2.content"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
    ],
)
async def test_what_cannot_be_had_is_refused_by_name(
    shared: HttpService, fields: dict[str, Any], param: str
) -> None:
    may_be_auto = "tool_choice" in fields or fields == {} or "tools" in fields
    body = asking(**fields) if may_be_auto else asking(tool_choice="none", **fields)

    reply = await shared.post(RESPONSES, body)

    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
