"""``echo`` with ``logprobs``: what evaluation harnesses send to judge a text that they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.http_service import HttpService

COMPLETIONS = "/v1/completions"
NO_LOGPROBS: dict[str, Any] = {
    "tokens": [],
    "token_logprobs": [],
    "top_logprobs": [],
    "text_offset": [],
}


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]])
async def test_the_prompts_tokens_come_first_and_the_first_has_none(
    shared: HttpService, prompt: Any
) -> None:
    body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}

    reply = (await shared.post(COMPLETIONS, body)).json()

    [choice] = reply["choices"]
    assert choice["text"] == "abcd"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "d"],
        "token_logprobs": [None, -1.0, -1.0, -1.0],
        "top_logprobs": [None, {"b": -1.0}, {"c": -1.0}, {"d": -1.0}],
        "text_offset": [0, 1, 2, 3],
    }
    assert reply["usage"]["prompt_tokens"] == 3
    assert reply["usage"]["completion_tokens"] == 1


async def test_no_token_at_all_may_be_asked_for(shared: HttpService) -> None:
    body = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}

    reply = (await shared.post(COMPLETIONS, body)).json()

    [choice] = reply["choices"]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert reply["usage"]["completion_tokens"] == 0
    assert reply["budget"]["exit_layer"] == 6


async def test_no_token_and_no_log_probabilities_is_the_prompt(shared: HttpService) -> None:
    body = {"prompt": ["ab", "xyz"], "max_tokens": 0, "echo": True}

    whole = (await shared.post(COMPLETIONS, body)).json()
    events = await shared.events(COMPLETIONS, body)

    assert [choice["text"] for choice in whole["choices"]] == ["ab", "xyz"]
    texts = {0: "", 1: ""}
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "ab", 1: "xyz"}


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_a_stream_says_the_same(shared: HttpService, max_tokens: int) -> None:
    prompts = [[97, 98], [120, 121, 122]]
    body = {"prompt": prompts, "n": 2, "max_tokens": max_tokens, "echo": True, "logprobs": 2}

    whole = (await shared.post(COMPLETIONS, body)).json()["choices"]
    events = await shared.events(COMPLETIONS, body)

    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    for choice in whole:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [x for part in parts for x in part["logprobs"][name]] == values
        assert len(choice["logprobs"]["tokens"]) == len(choice["text"])


async def test_a_harness_finds_its_continuations(shared: HttpService) -> None:
    """Contexts and continuations as token ids, one new token that is cut off again."""
    pairs = [([97], [98, 99]), ([120, 121], [122])]
    body = {
        "prompt": [context + continuation for context, continuation in pairs],
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "seed": 1234,
        "temperature": 0,
    }

    choices = (await shared.post(COMPLETIONS, body)).json()["choices"]

    for choice, (context, continuation) in zip(choices, pairs, strict=True):
        said = slice(len(context), -1)
        assert sum(choice["logprobs"]["token_logprobs"][said]) == -len(continuation)
        tokens, tops = (choice["logprobs"][name][said] for name in ("tokens", "top_logprobs"))
        assert all(t == max(top, key=top.get) for t, top in zip(tokens, tops, strict=True))


async def test_more_than_a_reply_may_hold_is_refused_before_it_runs(
    make: Callable[..., HttpService],
) -> None:
    service = make(max_n=200)
    body = {"n": 2, "max_tokens": 0, "echo": True, "logprobs": 20}

    reply = await service.post(COMPLETIONS, {**body, "prompt": ["a" * 250] * 100})

    assert not service.runner.plans
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "echo"
