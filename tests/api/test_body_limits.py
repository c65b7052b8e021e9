"""Everything a client sends has a maximum: what is at it is served, what is over it has a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sortserve.api.bodies import limits
from sortserve.api.http.middleware import REQUEST_ID_PATTERN
from support.http_service import HttpService, make_service

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
CONTEXT = 256
MAX_CHARS = 2 * CONTEXT

ROWS = {
    "the same on `/tokenize`": "MIN_TOKENIZE_CHARS",
    "tokens that `/tokenize` and `/detokenize` take": "MIN_ENCODED_TOKENS",
    "token ids of all prompts": "MAX_TOKEN_IDS",
    "characters that `echo` repeats, over all answers": "MAX_ECHO_CHARS",
    "log probabilities in a reply that is not streamed: answers x `max_tokens` x (rivals + 1)": (
        "MAX_LOGPROBS_PER_REPLY"
    ),
    "`messages`": "MAX_MESSAGES",
    "fields of a message, or of a part of its content": "MAX_MESSAGE_FIELDS",
    "parts of a content": "MAX_PARTS",
    "characters of a `role`": "MAX_ROLE_CHARS",
    "strings, lists, objects and names in all messages": "MAX_MESSAGE_VALUES",
    "depth of `messages`": "MAX_MESSAGE_DEPTH",
    "names in `chat_template_kwargs`": "MAX_TEMPLATE_VARIABLES",
    "strings, lists, objects and names in `chat_template_kwargs`": "MAX_TEMPLATE_VALUES",
    "depth of `chat_template_kwargs`": "MAX_TEMPLATE_DEPTH",
    "`stop`": "MAX_STOP_STRINGS",
    "characters of one stop string": "MAX_STOP_CHARS",
    "`stop_token_ids`": "MAX_STOP_TOKEN_IDS",
    "`logit_bias`": "MAX_LOGIT_BIAS",
    "fields of `budget`": "MAX_BUDGET_FIELDS",
    "fields of `format`, `response_format` and `structured_outputs`": "MAX_FORMAT_FIELDS",
    "characters of a schema, a grammar or an expression": "MAX_FORMAT_CHARS",
    "strings, lists, objects and names in a schema": "MAX_FORMAT_VALUES",
    "depth of a schema, with what is around it": "MAX_FORMAT_DEPTH",
    "`tools`": "MAX_TOOLS",
    "characters of `model`, and of `cache_salt`": "MAX_NAME_CHARS",
    "fields of the body": "MAX_FIELDS",
    "bytes of a name, at any depth": "MAX_KEY_CHARS",
    "characters of a number": "MAX_NUMBER_CHARS",
    "strings, lists, objects and names in all other fields, known or not": "MAX_OTHER_VALUES",
    "entries of lists and objects in all other fields": "MAX_OTHER_NUMBERS",
    "characters in all other fields": "MAX_OTHER_CHARS",
    "depth of any other field": "MAX_OTHER_DEPTH",
}
"""Rows of the table on the page, and the constants that hold them."""


@pytest.fixture(scope="module")
def shared() -> Iterator[HttpService]:
    service = make_service(max_token_chars=2)
    yield service
    service.worker.stop()


def most_on_page() -> dict[str, str]:
    """The table of what a body may hold: what, and the most of it."""
    _, _, section = PAGE.partition("### What a body may hold\n")
    return dict(re.findall(r"^\| (.+) \| (.+) \|$", section, re.MULTILINE))


def test_the_page_says_every_limit_as_the_code_has_it() -> None:
    constants = {name for name in vars(limits) if name.startswith(("MAX_", "MIN_"))}
    found = most_on_page()

    assert constants == set(ROWS.values())
    for what, name in ROWS.items():
        assert found[what].split()[-1 if "character" not in found[what] else -2] == (
            f"{getattr(limits, name):,}"
        ), what
    assert found["characters of `request_id`"] in REQUEST_ID_PATTERN


def test_the_limits_that_depend_on_the_context_are_as_the_page_says() -> None:
    short = limits.BodyLimits(max_model_len=100, max_token_chars=10, max_sequences=4)
    long = limits.BodyLimits(max_model_len=200_000, max_token_chars=10, max_sequences=4)

    assert (short.max_text_chars, long.max_text_chars) == (1000, 2_000_000)
    assert (short.max_tokenize_chars, long.max_tokenize_chars) == (524_288, 2_000_000)
    assert (short.max_encoded_tokens, long.max_encoded_tokens) == (16_384, 400_000)
    assert (short.max_token_ids, long.max_token_ids) == (262_144, 400_000)


def message(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": "a", **fields}


def parts(count: int, **fields: Any) -> dict[str, Any]:
    return message(content=[{"type": "text", "text": "a", **fields}, *[TEXT] * (count - 1)])


TEXT = {"type": "text", "text": ""}
CONTENT = [message()]

AT_THE_LIMIT: list[tuple[str, dict[str, Any]]] = [
    (GENERATE, {"prompt": "a" * 255}),
    (CHAT, {"messages": [message(), *[message(content="")] * 20]}),
    (CHAT, {"messages": [parts(64)]}),
    (CHAT, {"messages": [message(role="u" * 64)]}),
    (CHAT, {"messages": [message(**{f"x{i}": 0 for i in range(30)})]}),
    (CHAT, {"messages": CONTENT, "chat_template_kwargs": {f"x{i}": i for i in range(64)}}),
    (CHAT, {"messages": CONTENT, "chat_template_kwargs": {"documents": [{"a": "b"}] * 100}}),
    (GENERATE, {"prompt": "a", "stop": ["b" * 256] * 16}),
    (GENERATE, {"prompt": "a", "stop_token_ids": [1] * 1024}),
    (GENERATE, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(128)}}),
    (GENERATE, {"prompt": "a", "cache_salt": "s" * 256}),
    (GENERATE, {"prompt": "a", "request_id": "i" * 128}),
    (COMPLETIONS, {"prompt": "a", **{f"x{i}": i for i in range(250)}}),
    (COMPLETIONS, {"prompt": "a", "user": "u" * 10_000, "metadata": {"k": ["v"] * 1000}}),
    (COMPLETIONS, {"prompt": "a", "x": 10**4000, "y": 0.123456789e-5}),
    (COMPLETIONS, {"prompt": ["a"] * 128}),
    (COMPLETIONS, {"prompt": ["a"] * 64, "n": 2, "logprobs": 20}),
    ("/detokenize", {"tokens": [97] * 16_384}),
    ("/tokenize", {"prompt": "a" * 524_288}),
]


@pytest.mark.parametrize(("path", "body"), AT_THE_LIMIT, ids=range(len(AT_THE_LIMIT)))
async def test_what_is_within_the_limits_is_served(
    shared: HttpService, path: str, body: dict[str, Any]
) -> None:
    if "tokenize" not in path:
        body = {**body, "max_tokens": 1}

    reply = await shared.post(path, body)

    assert reply.status_code == 200, reply.text[:500]


OVER_THE_LIMIT: list[tuple[str, dict[str, Any], str]] = [
    (GENERATE, {"prompt": "a" * (MAX_CHARS + 1)}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "a" * (MAX_CHARS + 1)]}, "prompt.1"),
    (CHAT, {"messages": [message(content="a" * (MAX_CHARS + 1))]}, "messages"),
    (CHAT, {"messages": [message(name="a" * (MAX_CHARS + 1))]}, "messages"),
    (CHAT, {"messages": [message(x=[{"y": "a" * (MAX_CHARS + 1)}])]}, "messages"),
    (CHAT, {"messages": [message(content="a" * 99)] * 9}, "messages"),
    (
        CHAT,
        {"messages": CONTENT, "chat_template_kwargs": {"x": "a" * (MAX_CHARS + 1)}},
        "messages",
    ),
    (CHAT, {"messages": CONTENT * 4097}, "messages"),
    (CHAT, {"messages": [parts(1025)]}, "messages.0.content"),
    (CHAT, {"messages": [message(role="u" * 65)]}, "messages.0.role"),
    (CHAT, {"messages": [message(**{f"x{i}": 0 for i in range(31)})]}, "messages.0"),
    (
        CHAT,
        {"messages": [parts(1, **{f"x{i}": 0 for i in range(31)})]},
        "messages.0.content.0",
    ),
    (
        CHAT,
        {"messages": CONTENT, "chat_template_kwargs": {f"x{i}": i for i in range(65)}},
        "chat_template_kwargs",
    ),
    (
        CHAT,
        {"messages": CONTENT, "chat_template_kwargs": {"x": [""] * 8192}},
        "chat_template_kwargs",
    ),
    (GENERATE, {"prompt": "a", "stop": "b" * 257}, "stop.0"),
    (GENERATE, {"prompt": "a", "stop": ["a", "b" * 257]}, "stop.1"),
    (GENERATE, {"prompt": "a", "stop": ["b"] * 17}, "stop"),
    (GENERATE, {"prompt": "a", "stop_token_ids": [1] * 1025}, "stop_token_ids"),
    (GENERATE, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    (GENERATE, {"prompt": "a", "budget": {f"x{i}": 1 for i in range(17)}}, "budget"),
    (GENERATE, {"prompt": "a", "cache_salt": "s" * 257}, "cache_salt"),
    (GENERATE, {"prompt": "a", "model": "m" * 257}, "model"),
    (GENERATE, {"prompt": "a", "request_id": "i" * 129}, "request_id"),
    (COMPLETIONS, {"prompt": "a", **{f"x{i}": i for i in range(256)}}, "x255"),
    (COMPLETIONS, {"prompt": "a", "user": "u" * 65_537}, "user"),
    (COMPLETIONS, {"prompt": "a", "tools": [{"x": "y"}] * 6000}, "tools"),
    (COMPLETIONS, {"prompt": "a", "suffix": "u" * 65_537}, "suffix"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
    ("/detokenize", {"tokens": [97] * 16_385}, "tokens"),
    ("/tokenize", {"prompt": "a" * 524_289}, "prompt"),
]


@pytest.mark.parametrize(("path", "body", "param"), OVER_THE_LIMIT, ids=range(len(OVER_THE_LIMIT)))
async def test_what_is_over_a_limit_is_refused_by_name(
    shared: HttpService, path: str, body: dict[str, Any], param: str
) -> None:
    reply = await shared.post(path, body)

    assert reply.status_code == 400, reply.text[:500]
    assert reply.json()["error"]["param"] == param
    assert re.search(r"\d", reply.json()["error"]["message"]), "the message says how much may be"


LONG_CONTEXT = {"engine_options": {"max_model_len": 65_536}, "max_token_chars": 2}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a" * 40_000, "n": 128, "echo": True}, "echo"),
        ({"prompt": [[97] * 40_000] * 2, "n": 60, "echo": True}, "echo"),
        ({"prompt": "a", "n": 128, "logprobs": 20, "max_tokens": 400}, "logprobs"),
        ({"prompt": ["a", "b"], "logprobs": 20, "max_tokens": 30_000}, "logprobs"),
    ],
)
async def test_a_reply_that_would_be_too_large_is_refused_before_it_is_made(
    make: Callable[..., HttpService], fields: dict[str, Any], param: str
) -> None:
    service = make(**LONG_CONTEXT)

    reply = await service.post(COMPLETIONS, fields)

    assert reply.status_code == 400, reply.text[:500]
    assert reply.json()["error"]["param"] == param
    assert service.runner.plans == []


async def test_prompts_after_one_that_is_too_long_are_not_tokenised(
    make: Callable[..., HttpService],
) -> None:
    service = make()
    seen: list[str] = []
    encode = service.tokenizer.encode

    def counted(text: str, add_special_tokens: bool = True) -> list[int]:
        seen.append(text)
        return encode(text, add_special_tokens)

    service.tokenizer.encode = counted  # type: ignore[method-assign]

    reply = await service.post(COMPLETIONS, {"prompt": ["a", "b" * 300, "c", "d"]})

    assert reply.json()["error"]["param"] == "prompt.1"
    assert seen == ["a", "b" * 300]
