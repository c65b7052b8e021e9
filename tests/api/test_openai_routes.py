"""``/v1/completions`` and ``/v1/chat/completions``: shapes of replies and of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.http_service import HttpService
from support.scripted import EOS

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER_A = [{"role": "user", "content": "a"}]


def without(message: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in names}


async def test_a_completion_has_openais_shape_and_sixteen_tokens_by_default(
    shared: HttpService,
) -> None:
    reply = (await shared.post(COMPLETIONS, {"model": "tiny", "prompt": "a"})).json()

    assert reply["object"] == "text_completion"
    assert reply["id"].startswith("cmpl-")
    assert isinstance(reply["created"], int)
    [choice] = reply["choices"]
    assert choice["text"] == "bcdefghijklmnopq"
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert reply["usage"]["total_tokens"] == 17
    assert reply["budget"]["exit_layer"] == 6
    assert "service_tier" not in reply


async def test_the_default_limit_shrinks_to_what_the_context_holds(shared: HttpService) -> None:
    reply = (await shared.post(COMPLETIONS, {"prompt": "a" * 250})).json()

    assert reply["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a", ["bc"]),
        (["a", "x"], ["bc", "yz"]),
        ([97], ["bc"]),
        ([[97], [120, 121]], ["bc", "za"]),
        ([[97], "x"], ["bc", "yz"]),
    ],
)
async def test_a_prompt_has_four_forms(shared: HttpService, prompt: Any, texts: list[str]) -> None:
    reply = (await shared.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 2})).json()

    assert [choice["text"] for choice in reply["choices"]] == texts


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(
    shared: HttpService,
) -> None:
    body = {"prompt": ["a", "xx"], "n": 2, "max_tokens": 1}

    reply = (await shared.post(COMPLETIONS, body)).json()

    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in reply["choices"]] == ["b", "b", "y", "y"]
    assert reply["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
async def test_echo_puts_the_prompt_before_the_answer(shared: HttpService, prompt: Any) -> None:
    body = {"prompt": prompt, "max_tokens": 1, "echo": True}

    whole = (await shared.post(COMPLETIONS, body)).json()
    events = await shared.events(COMPLETIONS, body)

    assert whole["choices"][0]["text"] == "abc"
    assert [event["choices"][0]["text"] for event in events] == ["ab", "c"]


async def test_completion_logprobs_have_parallel_lists_and_offsets(shared: HttpService) -> None:
    body = {"prompt": "a", "max_tokens": 2, "logprobs": 1}

    whole = (await shared.post(COMPLETIONS, body)).json()["choices"][0]["logprobs"]
    events = await shared.events(COMPLETIONS, body)

    assert whole == {
        "tokens": ["b", "c"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"b": -1.0}, {"c": -1.0}],
        "text_offset": [0, 1],
    }
    parts = [event["choices"][0]["logprobs"] for event in events]
    assert {name: [x for part in parts for x in part[name]] for name in whole} == whole


async def test_chat_logprobs_have_content_entries(shared: HttpService) -> None:
    body = {"messages": USER_A, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}

    whole = (await shared.post(CHAT, body)).json()["choices"][0]["logprobs"]
    [_, event] = await shared.events(CHAT, body)

    [entry] = whole["content"]
    assert without(entry, "top_logprobs") == {"token": "b", "logprob": -1.0, "bytes": [98]}
    assert [top["token"] for top in entry["top_logprobs"]] == ["b", "c"]
    assert event["choices"][0]["logprobs"] == whole


async def test_chat_logprobs_without_rivals(shared: HttpService) -> None:
    body = {"messages": USER_A, "max_tokens": 1, "logprobs": True}

    reply = (await shared.post(CHAT, body)).json()

    assert reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_a_chat_reply_has_openais_shape_and_fills_the_context_by_default(
    shared: HttpService,
) -> None:
    reply = (await shared.post(CHAT, {"messages": USER_A, "model": "tiny@2"})).json()

    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == "tiny@2"
    [choice] = reply["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].startswith("bcdef")
    assert reply["usage"]["completion_tokens"] == 255
    assert reply["budget"]["exit_layer"] == 2


async def test_content_may_be_text_parts_and_developer_is_the_system(shared: HttpService) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": parts}]

    reply = await shared.post(CHAT, {"messages": messages, "max_completion_tokens": 1})

    assert reply.json()["choices"][0]["message"]["content"] == "z"


async def test_a_chat_stream_has_role_text_end_usage_and_done(
    make: Callable[..., HttpService],
) -> None:
    service = make(rule=lambda tokens, exit_layer: EOS if len(tokens) > 1 else ord("H"))
    body = {
        "model": "tiny",
        "messages": USER_A,
        "stream_options": {"include_usage": True},
        "request_id": "c1",
    }

    events = await service.events(CHAT, body)

    head = {"id": "chatcmpl-c1", "object": "chat.completion.chunk", "model": "tiny"}
    assert all(head.items() <= event.items() for event in events)
    assert len({event["created"] for event in events}) == 1
    assert [event["choices"] for event in events] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "H"}, "finish_reason": None}],
        [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        [],
    ]
    assert ["budget" in event for event in events] == [False, False, True, False]
    assert ["usage" in event for event in events] == [False, False, False, True]
    assert events[-1]["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_last_token_carries_its_text_and_the_finish_reason(shared: HttpService) -> None:
    chat = await shared.events(CHAT, {"messages": USER_A, "max_tokens": 2})
    completion = await shared.events(COMPLETIONS, {"prompt": "a", "max_tokens": 2})

    assert chat[-1]["choices"] == [
        {"index": 0, "delta": {"content": "c"}, "finish_reason": "length"}
    ]
    assert [event["choices"][0] for event in completion] == [
        {"index": 0, "text": "b", "finish_reason": None},
        {"index": 0, "text": "c", "finish_reason": "length"},
    ]


async def test_running_usage_is_on_every_chunk_if_asked_for(shared: HttpService) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": ["a", "b"], "max_tokens": 3, "stream_options": options}

    events = await shared.events(COMPLETIONS, body)

    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == [1, 2, 3, 4, 5, 6, 6]
    assert events[-1]["choices"] == []


async def test_a_streamed_chat_of_n_names_the_role_of_each(shared: HttpService) -> None:
    events = await shared.events(CHAT, {"messages": USER_A, "max_tokens": 2, "n": 2})

    roles = [e["choices"][0]["index"] for e in events if "role" in e["choices"][0]["delta"]]
    assert roles == [0, 1]
    assert len(events) == 2 + 4


@pytest.mark.parametrize(
    ("tier", "served_as"),
    [
        *(("flex", "flex"), ("default", "default"), ("priority", "priority")),
        *(("auto", "default"), ("scale", "default"), ("ultrafast", "default")),
    ],
)
async def test_the_reply_names_the_service_tier_that_was_used(
    shared: HttpService, tier: str, served_as: str
) -> None:
    body = {"messages": USER_A, "max_tokens": 1, "service_tier": tier}

    whole = (await shared.post(CHAT, body)).json()
    events = await shared.events(CHAT, body)

    assert whole["service_tier"] == served_as
    assert all(event["service_tier"] == served_as for event in events)


async def test_fields_that_no_server_knows_are_tolerated(shared: HttpService) -> None:
    body = {"prompt": "a", "max_tokens": 1, "ignored_by_all": {"x": 1}, "user": "me", "best_of": 1}

    assert (await shared.post(COMPLETIONS, body)).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"functions": None, "modalities": ["text"], "priority": 0},
    ],
)
async def test_known_fields_with_values_that_ask_for_nothing_are_tolerated(
    shared: HttpService, fields: dict[str, Any]
) -> None:
    reply = await shared.post(CHAT, {"messages": USER_A, "max_tokens": 1, **fields})

    assert reply.status_code == 200


async def test_the_extras_of_other_servers_reach_the_sampler(service: HttpService) -> None:
    extras = {
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "min_tokens": 1,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "seed": -7,
    }
    openai = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "temperature": 0.7, "top_p": 0.9}

    await service.post(
        COMPLETIONS,
        {"prompt": "a", "max_tokens": 2, "logit_bias": {"65": 1.5}, **extras, **openai},
    )

    [first, *_] = service.runner.plans
    row = first.rows[0].sampling
    assert row is not None
    wanted = {**extras, **openai, "stop_token_ids": (5,), "logit_bias": {65: 1.5}}
    assert {name: getattr(row.params, name) for name in wanted} == wanted


async def test_models_lists_the_name_and_each_exit(shared: HttpService) -> None:
    listed = (await shared.get("/v1/models")).json()
    one = (await shared.get("/v1/models/tiny@4")).json()

    assert [entry["id"] for entry in listed["data"]] == ["tiny", "tiny@2", "tiny@4", "tiny@6"]
    assert one in listed["data"]
    assert (one["object"], one["exit_layer"], one["max_model_len"]) == ("model", 4, 256)
    assert one["license"] is None


async def test_a_licence_that_is_known_is_said_of_every_model_name(
    make: Callable[..., HttpService],
) -> None:
    listed = (await make(license="for research only").get("/v1/models")).json()

    assert {entry["license"] for entry in listed["data"]} == {"for research only"}


async def test_a_model_name_may_have_slashes_and_an_at_sign(
    make: Callable[..., HttpService],
) -> None:
    service = make(served_model_name="org/name@v2")

    found = await service.get("/v1/models/org/name@v2@4")
    served = await service.post(COMPLETIONS, {"model": "org/name@v2", "prompt": "a"})

    assert found.json()["exit_layer"] == 4
    assert served.json()["budget"]["exit_layer"] == 6
