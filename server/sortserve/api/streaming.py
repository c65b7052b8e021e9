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
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sortserve.api.generation import Generation, Outputs
from sortserve.errors import EngineError, SortserveError
from sortserve.outputs import RequestOutput

__all__ = ["END_OF_STREAM", "EventWriter", "GenerationReply", "GenerationStream", "event"]

logger = logging.getLogger(__name__)

END_OF_STREAM = "data: [DONE]\n\n"

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


class GenerationReply(Response):
    """Waits for the whole generation and sends what ``make_body`` says of it."""

    def __init__(
        self,
        generation: Generation,
        make_body: Callable[[], dict[str, Any]],
        *,
        timeout_s: float | None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({})
        self._generation = generation
        self._make_body = make_body
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
                await JSONResponse(self._make_body())(scope, receive, send)


class GenerationStream(Response):
    """Sends the generation's outputs as events, as they come."""

    def __init__(
        self, generation: Generation, writer: EventWriter, *, timeout_s: float | None
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)  # and not Response.__init__: it would add a content-length
        self._generation = generation
        self._writer = writer
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream. An error before the first output is raised, so that it gets its own status."""
        generation = self._generation
        async with (
            _watched(generation, receive, self._timeout_s),
            aclosing(generation.outputs()) as batches,
        ):
            first = await anext(batches)
            if generation.is_abandoned:
                return
            ready = [self._writer.opening()]
            self._write(first, ready)
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            try:
                await send(start)
                await self._send_all(ready, batches, send)
            except OSError:  # how a server says that the connection is gone
                generation.abandon()

    async def _send_all(
        self, ready: list[str], batches: AsyncIterator[Outputs], send: Send
    ) -> None:
        try:
            await _send_text(send, ready)
            async for outputs in batches:
                if self._generation.is_abandoned:
                    return
                self._write(outputs, ready)
                await _send_text(send, ready)
            ready.append(self._writer.closing())
        except SortserveError as error:
            ready.append(event(error.body()))
        except OSError:
            raise
        except Exception:
            logger.exception("a stream failed")
            ready.append(event(EngineError("The server failed on this request.").body()))
        ready.append(END_OF_STREAM)
        await _send_text(send, ready)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _write(self, outputs: Outputs, ready: list[str]) -> None:
        take, chunk = self._generation.take, self._writer.chunk
        for index, output in outputs:
            take(index, output)
            ready.append(chunk(index, output))


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
