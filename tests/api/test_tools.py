"""Tools on ``/v1/chat/completions``: calls that must come, and calls of the model's own accord."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from support.http_service import HttpService
from support.scripted import EOS

CHAT = "/v1/chat/completions"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "clock"}},
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
]


def asking(**fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "a"}
    return {"messages": [message], "tools": TOOLS, "max_tokens": 100, **fields}


def says(text: str) -> Callable[..., int]:
    """A model that writes a text after a prompt of one token, and ends."""

    def rule(tokens: Any, exit_layer: int) -> int:
        at = len(tokens) - 1
        return ord(text[at]) if at < len(text) else EOS

    return rule


HERMES = 'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


async def test_a_call_of_the_models_own_accord(make: Callable[..., HttpService]) -> None:
    service = make(rule=says(HERMES))
    service.tokenizer.tool_dialect = "hermes"

    [choice] = (await service.post(CHAT, asking())).json()["choices"]

    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"].strip() == "Let me see."
    [call] = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


async def test_a_stream_tells_of_the_call_once_it_is_whole(
    make: Callable[..., HttpService],
) -> None:
    service = make(rule=says(HERMES))
    service.tokenizer.tool_dialect = "hermes"

    reply = await service.post(CHAT, asking(stream=True))

    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line[:7] == "data: {"]
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == "Let me see."
    [calls] = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_without_a_call_there_is_text(make: Callable[..., HttpService]) -> None:
    service = make(rule=says("It rains."))
    service.tokenizer.tool_dialect = "hermes"

    [choice] = (await service.post(CHAT, asking())).json()["choices"]

    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "It rains."}


async def test_a_template_without_tools_says_that_auto_is_not_possible(
    shared: HttpService,
) -> None:
    for fields in ({}, {"tool_choice": "auto"}):
        reply = await shared.post(CHAT, asking(**fields))
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "tool_choice"
        assert "Hermes" in reply.json()["error"]["message"]


async def test_none_asks_for_text(shared: HttpService) -> None:
    reply = await shared.post(CHAT, asking(tool_choice="none", max_tokens=2))

    assert reply.json()["choices"][0]["message"]["content"] == "bc"


async def test_a_forced_call_has_no_text_for_a_format(shared: HttpService) -> None:
    """Frameworks send both; what constrains the whole answer is another thing."""
    forced = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "clock"}}}
    text = {"response_format": {"type": "json_object"}}
    regex = {"structured_outputs": {"regex": "a"}}

    with_text = await shared.post(CHAT, asking(**forced, **text))
    with_regex = await shared.post(CHAT, asking(**forced, **regex))

    [call] = with_text.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "clock"
    assert (with_regex.status_code, with_regex.json()["error"]["param"]) == (400, "tool_choice")


@pytest.mark.parametrize(
    "arguments",
    ['{"city": "Rome"}', "", '{"city": ', "[" * 30_000, {"city": "Rome"}],
    ids=["json", "none", "cut", "deep", "object"],
)
async def test_earlier_calls_and_their_results_go_to_the_template(
    shared: HttpService, arguments: Any
) -> None:
    function = {"name": "weather", "arguments": arguments}
    messages = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "x"},
    ]

    reply = await shared.post(CHAT, {"messages": messages, "max_tokens": 2})

    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == "yz"


@pytest.mark.parametrize("calls", [[{}], [{"function": {}}], "calls"])
async def test_earlier_calls_that_are_none_are_refused(shared: HttpService, calls: Any) -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}]

    reply = await shared.post(CHAT, {"messages": messages})

    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("messages.0.tool_calls")
