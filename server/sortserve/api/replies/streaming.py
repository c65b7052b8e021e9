"""Replies that come from a running generation, as one JSON object or as server-sent events.

Both watch for the client's disconnect while they wait, and abort the generation at once. The event
path is the hot one: hundreds of events a second pass next to the engine's thread, so a writer makes
a string per event without building objects, and events that are ready together leave in one send.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol, Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sortserve.api.generation import Generation, Outputs
from sortserve.api.replies.large_json import json_reply
from sortserve.api.text_threads import TextThreads
from sortserve.core.errors import EngineError, SortserveError
from sortserve.core.request import RequestOutput

__all__ = ["END_OF_STREAM", "EventWriter", "GenerationReply", "GenerationStream", "event"]

logger = logging.getLogger(__name__)

END_OF_STREAM = "data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
COMMENT_INTERVAL_S = 10.0
"""Below the time after which proxies give up on a silent connection, 30 to 60 s."""

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}


def event(message: dict[str, Any]) -> str:
    """One server-sent event. ASCII only: some readers split lines at exotic Unicode line ends."""
    return f"data: {json.dumps(message, separators=(',', ':'))}\n\n"


class EventWriter(Protocol):
    """The events of one route's stream."""

    def opening(self) -> str:
        """Events before the first token."""

    def chunk(self, index: int, output: RequestOutput) -> str:
        """The one event of a token step of choice ``index``."""

    def closing(self) -> str:
        """Events after the last token, without ``[DONE]``."""

    def failure(self, error: SortserveError) -> str:
        """The last event of a stream that failed."""

    @property
    def end(self) -> str:
        """What stands at the end of a stream, failed or not."""


class GenerationReply(Response):
    """Waits for the whole generation and sends what ``make_body`` says of it."""

    def __init__(
        self,
        generation: Generation,
        make_body: Callable[[], dict[str, Any]],
        threads: TextThreads,
        *,
        timeout_s: float | None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({})
        self._generation = generation
        self._make_body = make_body
        self._threads = threads
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; the errors of the generation are raised, as nothing has been sent yet."""
        generation = self._generation
        async with _watched(generation, receive, self._timeout_s):
            async with aclosing(generation.outputs()) as batches:
                async for outputs in batches:
                    for index, output in outputs:
                        generation.take(index, output)
            if not generation.is_abandoned:
                reply = await json_reply(self._make_body, generation.num_values, self._threads)
                reply.headers.update(generation.last_headers())
                await reply(scope, receive, send)


class GenerationStream(Response):
    """Sends the generation's outputs as events, as they come.

    The headers leave at once, however long the request waits for its first token: what refuses it
    on arrival has been raised by then, and has its own status. Later errors are events.
    """

    def __init__(
        self, generation: Generation, writer: EventWriter, *, timeout_s: float | None
    ) -> None:
        self.status_code = 200
        self.background = None
        # And not Response.__init__: it would add a content-length.
        self.init_headers({**_HEADERS, **generation.first_headers()})
        self._generation = generation
        self._writer = writer
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream."""
        generation = self._generation
        async with (
            _watched(generation, receive, self._timeout_s),
            aclosing(generation.outputs()) as batches,
        ):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            try:
                await send(start)
                with _Comments(send, on_lost=generation.abandon) as comments:
                    await self._send_all(batches, send, comments)
                if not generation.is_abandoned:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            except OSError:  # how a server says that the connection is gone
                generation.abandon()

    async def _send_all(
        self, batches: AsyncIterator[Outputs], send: Send, comments: _Comments
    ) -> None:
        ready: list[str] = []
        has_opened = False
        try:
            async for outputs in batches:
                if self._generation.is_abandoned:
                    return
                if not has_opened:
                    has_opened = True
                    ready.append(self._writer.opening())
                self._write(outputs, ready)
                await _send_text(send, ready)
                comments.put_off()
            ready.append(self._writer.closing())
        except SortserveError as error:
            ready.append(self._writer.failure(error))
        except OSError:
            raise
        except Exception:
            logger.exception("a stream failed")
            failed = EngineError("The server failed on this request.")
            ready.append(self._writer.failure(failed))
        ready.append(self._writer.end)
        await _send_text(send, ready)

    def _write(self, outputs: Outputs, ready: list[str]) -> None:
        take, chunk = self._generation.take, self._writer.chunk
        for index, output in outputs:
            take(index, output)
            ready.append(chunk(index, output))


class _Comments:
    """A comment whenever a stream was silent for ``COMMENT_INTERVAL_S``.

    Proxies and clients take a silent connection for a dead one; a comment is no event to anybody.

    Args:
        send: the connection.
        on_lost: called when the connection turns out to be gone.
    """

    def __init__(self, send: Send, *, on_lost: Callable[[], None]) -> None:
        self._send = send
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._begin_anew()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pending in (self._timer, self._sending):
            if pending is not None:
                pending.cancel()

    def put_off(self) -> None:
        """Something was sent: the silence begins anew.

        The timer is left to ring too early: to set one for each token is work for nothing.
        """
        self._due_s = self._loop.time() + COMMENT_INTERVAL_S

    def _begin_anew(self) -> None:
        self.put_off()
        self._timer = self._loop.call_later(COMMENT_INTERVAL_S, self._ring)

    def _ring(self) -> None:
        left_s = self._due_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._ring)
        else:
            self._sending = self._loop.create_task(self._comment())

    async def _comment(self) -> None:
        try:
            await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
        except OSError:
            self._on_lost()
        else:
            self._begin_anew()


async def _send_text(send: Send, ready: list[str]) -> None:
    body = "".join(ready).encode("ascii")
    ready.clear()
    await send({"type": "http.response.body", "body": body, "more_body": True})


@asynccontextmanager
async def _watched(
    generation: Generation, receive: Receive, timeout_s: float | None
) -> AsyncIterator[None]:
    """End the generation when the client leaves, when time is over, and on the way out."""
    watcher = asyncio.create_task(_abandon_on_disconnect(generation, receive))
    timer = None
    if timeout_s is not None:
        timer = asyncio.get_running_loop().call_later(timeout_s, generation.time_out)
    try:
        yield
    finally:
        generation.abort()
        watcher.cancel()
        if timer is not None:
            timer.cancel()


async def _abandon_on_disconnect(generation: Generation, receive: Receive) -> None:
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except OSError:
        pass
    generation.abandon()
