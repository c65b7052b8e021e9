"""The client's streams: pieces, the whole, leaving early, and breaking in the middle."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from sortserve_client import (
    AsyncClient,
    AsyncGenerationStream,
    Client,
    Generation,
    GenerationStream,
    OverloadedError,
    StreamError,
    StreamEvent,
)


def piece(text: str, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"id": "gen-1", "model": "tiny", "choices": [{"index": index, "text": text, **fields}]}


def sse(*messages: dict[str, Any] | str) -> list[bytes]:
    """One chunk for each message; a plain string is sent as it is."""
    texts = (m if isinstance(m, str) else json.dumps(m, ensure_ascii=False) for m in messages)
    return [f"data: {text}\n\n".encode() for text in texts]


BUDGET = {"exit_layer": 9, "tokens_by_exit": {"9": 3}, "met": True}
USAGE = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
WHOLE = sse(
    piece("Grüße"),
    piece(", "),
    piece("du!", finish_reason="stop") | {"usage": USAGE, "budget": BUDGET},
    "[DONE]",
)


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A response body in the given chunks; an exception among them is raised in its place."""

    def __init__(self, *chunks: bytes | Exception) -> None:
        self._chunks = chunks
        self.num_sent = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            if isinstance(chunk, Exception):
                raise chunk
            self.num_sent += 1
            yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


class Server:
    """Answers every request with the next body, or a ready response."""

    def __init__(self, *answers: Body | httpx.Response) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, httpx.Response):
            return answer
        headers = {"content-type": "text/event-stream", "x-request-id": "req-7"}
        return httpx.Response(200, headers=headers, stream=answer)


def open_stream(server: Server, **options: Any) -> GenerationStream:
    http = httpx.Client(transport=httpx.MockTransport(server))
    return Client(http_client=http, sleep=lambda _: None).stream("Hi", **options)


def open_async_stream(server: Server, **options: Any) -> AsyncGenerationStream:
    async def sleep(_: float) -> None:
        pass

    http = httpx.AsyncClient(transport=httpx.MockTransport(server))
    return AsyncClient(http_client=http, sleep=sleep).stream("Hi", **options)


async def read(kind: str, server: Server) -> tuple[list[StreamEvent], Generation]:
    """All events and the result, by the sync or the async client."""
    if kind == "sync":
        with open_stream(server) as stream:
            return list(stream), stream.result()
    async with open_async_stream(server) as astream:
        return [event async for event in astream], await astream.result()


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_pieces_add_up_to_the_whole_answer(kind: str) -> None:
    body = Body(*WHOLE)

    events, result = await read(kind, Server(body))

    assert [event.text for event in events] == ["Grüße", ", ", "du!"]
    assert events[-1].finish_reason == "stop"
    assert events[-1].budget == result.budget
    assert result.text == "Grüße, du!"
    assert (result.id, result.finish_reason) == ("gen-1", "stop")
    assert result.usage.total_tokens == 7
    assert result.budget.tokens_by_exit == {9: 3}
    assert body.closed


async def test_comments_of_a_waiting_server_are_no_events(kind: str) -> None:
    waiting = b": waiting\n\n"
    chunks = [part for chunk in WHOLE for part in (waiting, waiting, chunk)]

    commented = await read(kind, Server(Body(*chunks)))

    assert commented == await read(kind, Server(Body(*WHOLE)))


async def test_the_cut_of_the_chunks_does_not_matter(kind: str) -> None:
    wire = b"".join(WHOLE).replace(b"\n\n", b"\r\n\r\n")
    chunks = [wire[i : i + 5] for i in range(0, len(wire), 5)]

    _, result = await read(kind, Server(Body(b": hello\n\n", *chunks)))

    assert result.text == "Grüße, du!"


async def test_several_answers_are_kept_apart(kind: str) -> None:
    parts = {"exit_layer": 9}
    messages = sse(
        piece("a", 1),
        piece("x", 0),
        piece("b", 1, finish_reason="length", budget=parts),
        piece("y", 0, finish_reason="stop", budget=parts),
        {"id": "gen-1", "choices": [], "usage": USAGE, "budget": BUDGET},
        "[DONE]",
    )

    events, result = await read(kind, Server(Body(*messages)))

    assert [(choice.text, choice.finish_reason) for choice in result.choices] == [
        ("xy", "stop"),
        ("ab", "length"),
    ]
    assert result.choices[0].budget is not None
    assert result.choices[0].budget.tokens_by_exit == {}
    assert result.budget.tokens_by_exit == {9: 3}
    assert events[-1].usage == result.usage


async def test_a_budget_beside_one_of_several_choices_is_that_choices(kind: str) -> None:
    messages = sse(
        piece("a", 0, finish_reason="stop") | {"budget": {"exit_layer": 9}},
        piece("b", 1, finish_reason="stop") | {"budget": {"exit_layer": 30}},
        "[DONE]",
    )

    _, result = await read(kind, Server(Body(*messages)))

    assert [choice.budget.exit_layer for choice in result.choices if choice.budget] == [9, 30]
    assert result.budget.exit_layer is None


async def test_token_ids_are_collected(kind: str) -> None:
    messages = sse(piece("a", token_ids=[5, 6]), piece("b", token_ids=[7]), "[DONE]")

    events, result = await read(kind, Server(Body(*messages)))

    assert events[0].token_ids == (5, 6)
    assert result.choices[0].token_ids == (5, 6, 7)


async def test_logprobs_are_collected(kind: str) -> None:
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    rival = {"token": "b", "logprob": -1.5}
    messages = sse(
        piece("a", logprobs={"content": [entry]}),
        piece("a", logprobs={"content": [entry | {"top_logprobs": [rival]}]}),
        "[DONE]",
    )

    _, result = await read(kind, Server(Body(*messages)))

    logprobs = result.choices[0].logprobs
    assert logprobs is not None
    assert [entry.logprob for entry in logprobs] == [-0.5, -0.5]
    assert logprobs[0].bytes == (97,)
    assert logprobs[1].top_logprobs[0].token == "b"


def test_the_request_asks_for_a_stream_and_is_sent_when_it_is_read() -> None:
    server = Server(Body(*WHOLE))

    stream = open_stream(server, max_tokens=3)
    assert server.requests == []
    next(stream)

    assert json.loads(server.requests[0].content) == {
        "stream": True,
        "prompt": "Hi",
        "max_tokens": 3,
    }


async def test_a_refusal_is_retried_and_bytes_of_a_stream_never_are(kind: str) -> None:
    refusal = httpx.Response(429, json={"error": {"message": "full"}})
    broken = Body(WHOLE[0], httpx.ReadError("reset"))
    server = Server(refusal, broken, Body(*WHOLE))

    with pytest.raises(StreamError):
        await read(kind, server)

    assert len(server.requests) == 2
    assert broken.closed


async def test_a_refusal_is_raised_where_the_stream_is_entered(kind: str) -> None:
    def full() -> httpx.Response:
        return httpx.Response(429, stream=Body(b'{"error": {"message": "full"}}'))

    with pytest.raises(OverloadedError, match="full"):
        await read(kind, Server(full(), full(), full()))


# Leaving early.


def test_leaving_the_block_early_closes_the_connection() -> None:
    body = Body(*WHOLE)

    with open_stream(Server(body)) as stream:
        for _ in stream:
            break
        assert not body.closed
        assert stream.snapshot().text == "Grüße"

    assert body.closed
    assert body.num_sent == 1


async def test_leaving_the_async_block_early_closes_the_connection() -> None:
    body = Body(*WHOLE)

    async with open_async_stream(Server(body)) as stream:
        async for _ in stream:
            break
        assert not body.closed

    assert body.closed
    assert body.num_sent == 1


def test_leaving_a_loop_over_a_stream_that_nobody_holds_closes_the_connection() -> None:
    body = Body(*WHOLE)

    for _ in open_stream(Server(body)):
        break

    assert body.closed


def test_an_exception_in_the_block_closes_the_connection() -> None:
    body = Body(*WHOLE)

    with pytest.raises(KeyError), open_stream(Server(body)):
        raise KeyError

    assert body.closed
    assert body.num_sent == 0


async def test_a_stream_that_was_left_early_has_no_result() -> None:
    stream = open_stream(Server(Body(*WHOLE)))
    next(stream)
    stream.close()
    astream = open_async_stream(Server(Body(*WHOLE)))
    await anext(astream)
    await astream.close()

    with pytest.raises(StreamError, match="before the answer was complete") as caught:
        stream.result()
    with pytest.raises(StreamError, match="before the answer was complete"):
        await astream.result()

    assert caught.value.partial is not None
    assert caught.value.partial.text == "Grüße"


async def test_a_stream_closed_before_it_began_sends_nothing() -> None:
    server = Server(Body(*WHOLE))
    stream, astream = open_stream(server), open_async_stream(server)
    stream.close()
    await astream.close()

    with pytest.raises(StreamError, match="before it began"):
        next(stream)
    with pytest.raises(StreamError, match="before it began"):
        await anext(astream)

    assert server.requests == []


def test_the_result_reads_what_the_loop_left() -> None:
    with open_stream(Server(Body(*WHOLE))) as stream:
        next(stream)

        assert stream.result().text == "Grüße, du!"


# Breaking in the middle.


async def test_an_error_inside_the_stream_is_raised_after_the_pieces_before_it(kind: str) -> None:
    error = {"message": "engine failed", "type": "internal_error", "code": "engine_error"}
    wire = b"".join(sse(piece("Gr"), {"error": error}, "[DONE]"))

    with pytest.raises(StreamError, match="engine failed") as caught:
        await read(kind, Server(Body(wire)))

    assert (caught.value.code, caught.value.request_id) == ("engine_error", "req-7")
    assert caught.value.partial is not None
    assert caught.value.partial.text == "Gr"


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        pytest.param(WHOLE[:2], "before the answer was complete", id="no-done"),
        pytest.param([], "before the answer was complete", id="nothing-at-all"),
        pytest.param([*WHOLE[:1], httpx.ReadTimeout("slow")], "ReadTimeout", id="silence"),
        pytest.param([*WHOLE[:1], httpx.ReadError("reset")], "ReadError", id="reset"),
        pytest.param(sse("not json"), "cannot be read", id="not-json"),
        pytest.param(sse("[]"), "cannot be read", id="not-an-object"),
        pytest.param(sse({"choices": [3]}), "cannot be read", id="a-choice-that-is-none"),
        pytest.param(sse({"error": "flat"}), "cannot be read", id="an-error-that-is-none"),
    ],
)
async def test_a_broken_stream_is_a_stream_error(
    kind: str, chunks: list[bytes | Exception], message: str
) -> None:
    body = Body(*chunks)

    with pytest.raises(StreamError, match=message):
        await read(kind, Server(body))

    assert body.closed


async def test_nothing_after_the_end_is_read_as_an_event(kind: str) -> None:
    events, _ = await read(kind, Server(Body(*WHOLE, *sse(piece("ghost")))))

    assert "ghost" not in [event.text for event in events]
