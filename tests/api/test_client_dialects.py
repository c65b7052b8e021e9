"""What clients in the field send beside the plain form: contents, numbers, encodings."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from support.http_service import HttpService

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
LIMIT = 20_000


def after(*contents: dict[str, Any]) -> dict[str, Any]:
    """A conversation; the scripted model goes on from the last letter of all contents."""
    return {"messages": [*contents], "max_tokens": 1}


async def send(service: HttpService, content: bytes, **headers: str) -> httpx.Response:
    async with service.client() as client:
        return await client.post(
            COMPLETIONS, content=content, headers={"content-type": "application/json", **headers}
        )


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


# ---- contents ----


@pytest.mark.parametrize("path", [CHAT, GENERATE])
@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": None, "refusal": "k"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "k"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "k"}]},
    ],
)
async def test_an_assistants_turn_may_have_no_text_or_a_refusal(
    shared: HttpService, path: str, turn: dict[str, Any]
) -> None:
    reply = await shared.post(path, after({"role": "user", "content": "a"}, turn))

    assert reply.json()["usage"]["prompt_tokens"] == 1 + (
        "k" in json.dumps(turn["content"])
        if isinstance(turn.get("content"), list)
        else "refusal" in turn
    )


async def test_parts_of_text_are_served_in_their_order(shared: HttpService) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "input_text", "text": "e"}]

    assert text_of(await shared.post(CHAT, after({"role": "user", "content": parts}))) == "f"


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "user", "content": None}, "messages.0.content"),
        (
            {"role": "user", "content": [{"type": "refusal", "refusal": "k"}]},
            "messages.0.content.0",
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "text": "k"}]},
            "messages.0.content.0.refusal",
        ),
        ({"role": "assistant", "content": 5}, "messages.0.content"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "messages.0.content.1",
        ),
    ],
)
async def test_other_contents_are_refused_by_name(
    shared: HttpService, turn: dict[str, Any], param: str
) -> None:
    reply = await shared.post(CHAT, after(turn))

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


async def test_tools_that_may_not_be_called_are_no_obstacle(shared: HttpService) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    body = {**after({"role": "user", "content": "a"}), "tools": tools}

    assert text_of(await shared.post(CHAT, {**body, "tool_choice": "none"})) == "b"


# ---- numbers ----


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, '{"prompt": "a", "max_tokens": 2.0, "n": 1.0, "seed": 3e0}'),
        (COMPLETIONS, '{"prompt": [97.0], "max_tokens": 2, "stop_token_ids": [5.0]}'),
        (GENERATE, '{"prompt": "a", "max_tokens": 2.0, "budget": {"exit_layer": 4.0}}'),
        (
            GENERATE,
            '{"prompt": "a", "max_tokens": 2, "budget": {"schedule": [[0.0, 6.0], [1.0, 2.0]]}}',
        ),
        ("/detokenize", '{"tokens": [98.0, 99]}'),
    ],
)
async def test_whole_numbers_may_have_a_point(shared: HttpService, path: str, body: str) -> None:
    async with shared.client() as client:
        headers = {"content-type": "application/json"}
        reply = await client.post(path, content=body, headers=headers)

    assert reply.status_code == 200, reply.text
    made = reply.json()
    assert (made["prompt"] if "prompt" in made else made["choices"][0]["text"]) == "bc"


@pytest.mark.parametrize("number", ["1.5", '"1"', "true", "1e300"])
async def test_other_numbers_are_no_integers(shared: HttpService, number: str) -> None:
    reply = await send(shared, b'{"prompt": "a", "max_tokens": %s}' % number.encode())

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "max_tokens"


async def test_what_a_template_is_given_is_left_as_it_was_written(shared: HttpService) -> None:
    body = {**after({"role": "user", "content": "a"}), "chat_template_kwargs": {"prefix": "4.0"}}

    assert (await shared.post(CHAT, body)).json()["usage"]["prompt_tokens"] == 4


# ---- encodings ----

BODY = b'{"prompt": "a", "max_tokens": 2}'
PACKED = gzip.compress(BODY, mtime=0)
LARGE = json.dumps({"prompt": "a", "max_tokens": 2, "user": "u" * 9000}).encode()


async def test_a_byte_order_mark_is_read_over(shared: HttpService) -> None:
    assert text_of(await send(shared, b"\xef\xbb\xbf" + BODY)) == "bc"


@pytest.mark.parametrize(
    "body", [BODY, LARGE, b"\xef\xbb\xbf" + BODY], ids=["small", "large", "marked"]
)
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
async def test_a_compressed_body_is_read(shared: HttpService, body: bytes, encoding: str) -> None:
    reply = await send(shared, gzip.compress(body), **{"content-encoding": encoding})

    assert text_of(reply) == "bc"


async def test_a_body_of_several_members_is_one_body(shared: HttpService) -> None:
    content = gzip.compress(BODY[:9]) + gzip.compress(BODY[9:])

    assert text_of(await send(shared, content, **{"content-encoding": "gzip"})) == "bc"


async def test_identity_is_no_compression(shared: HttpService) -> None:
    assert text_of(await send(shared, BODY, **{"content-encoding": "identity"})) == "bc"


@pytest.mark.parametrize("num_bytes", [LIMIT + 1, 50_000_000])
async def test_what_is_too_large_once_decompressed_is_a_413(
    make: Callable[..., HttpService], num_bytes: int
) -> None:
    service = make(max_body_bytes=LIMIT, max_n=100)
    bomb = zlib.compressobj(wbits=31)
    content = bomb.compress(b'{"prompt": "' + b"a" * num_bytes) + bomb.flush()
    content = content if len(content) <= LIMIT else content[:LIMIT]

    reply = await send(service, content, **{"content-encoding": "gzip"})

    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "payload_too_large"


@pytest.mark.parametrize(
    ("content", "encoding", "code"),
    [
        (BODY, "gzip", "invalid_gzip"),
        (PACKED[:-9], "gzip", "invalid_gzip"),
        (PACKED[:12] + b"\xff" * 30, "gzip", "invalid_gzip"),
        (PACKED + b"more", "gzip", "invalid_gzip"),
        (b"", "gzip", "invalid_json"),
        (BODY, "br", "unsupported_content_encoding"),
        (BODY, "gzip, gzip", "unsupported_content_encoding"),
    ],
    ids=["none", "no end", "broken", "something after", "nothing", "brotli", "twice"],
)
async def test_what_cannot_be_decompressed_is_a_400(
    shared: HttpService, content: bytes, encoding: str, code: str
) -> None:
    reply = await send(shared, content, **{"content-encoding": encoding})

    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == code
