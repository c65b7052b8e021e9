"""Streams of one generation, sync and async: iterate them, or use them as context managers.

Nothing is sent before the first event is asked for or the ``with`` block is entered. A stream that
is left early closes its connection, and the server then aborts the request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Self

import httpx

from sortserve_client._collector import Collector
from sortserve_client._exceptions import StreamError
from sortserve_client._types import Generation, StreamEvent

__all__ = ["AsyncGenerationStream", "GenerationStream"]


class GenerationStream:
    """Typed events of one request, as they come.

    The generator that reads the response holds no reference to this object: a loop that breaks
    out of a stream nobody else holds closes the connection at once.
    """

    def __init__(self, send: Callable[[], httpx.Response]) -> None:
        self._send = send
        self._collector = Collector()
        self._response: httpx.Response | None = None
        self._events: Generator[StreamEvent, None, None] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamEvent:
        return next(self._open())

    def result(self) -> Generation:
        """The whole answer; reads what is left of the stream.

        Raises:
            StreamError: the stream broke, or was closed early.
        """
        for _ in self:
            pass
        return self._collector.result()

    def snapshot(self) -> Generation:
        """The answer as far as it has come."""
        return self._collector.snapshot()

    def close(self) -> None:
        """Close the connection. Before the end, this aborts the request on the server."""
        self._closed = True
        if self._events is not None:
            self._events.close()
        if self._response is not None:  # a generator that never started closes nothing
            self._response.close()

    def _open(self) -> Generator[StreamEvent, None, None]:
        if self._events is None:
            if self._closed:
                raise StreamError("The stream was closed before it began.")
            self._response = self._send()
            self._events = _read(self._response, self._collector)
        return self._events


class AsyncGenerationStream:
    """The async twin of ``GenerationStream``.

    A loop that breaks out of it closes the connection when the event loop finalises the
    generator; ``async with`` closes it at once.
    """

    def __init__(self, send: Callable[[], Awaitable[httpx.Response]]) -> None:
        self._send = send
        self._collector = Collector()
        self._response: httpx.Response | None = None
        self._events: AsyncGenerator[StreamEvent, None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        return await anext(await self._open())

    async def result(self) -> Generation:
        """The whole answer; reads what is left of the stream.

        Raises:
            StreamError: the stream broke, or was closed early.
        """
        async for _ in self:
            pass
        return self._collector.result()

    def snapshot(self) -> Generation:
        """The answer as far as it has come."""
        return self._collector.snapshot()

    async def close(self) -> None:
        """Close the connection. Before the end, this aborts the request on the server."""
        self._closed = True
        if self._events is not None:
            await self._events.aclose()
        if self._response is not None:
            await self._response.aclose()

    async def _open(self) -> AsyncGenerator[StreamEvent, None]:
        if self._events is None:
            if self._closed:
                raise StreamError("The stream was closed before it began.")
            self._response = await self._send()
            self._events = _aread(self._response, self._collector)
        return self._events


def _read(response: httpx.Response, collector: Collector) -> Generator[StreamEvent, None, None]:
    collector.request_id = response.headers.get("x-request-id")
    with closing(response):
        try:
            for chunk in response.iter_bytes():
                yield from collector.feed(chunk)
        except httpx.HTTPError as error:
            raise _broken(collector, error) from error
    collector.result()  # raises if the end is missing


async def _aread(
    response: httpx.Response, collector: Collector
) -> AsyncGenerator[StreamEvent, None]:
    collector.request_id = response.headers.get("x-request-id")
    async with aclosing(response):
        try:
            async for chunk in response.aiter_bytes():
                for event in collector.feed(chunk):
                    yield event
        except httpx.HTTPError as error:
            raise _broken(collector, error) from error
    collector.result()


def _broken(collector: Collector, error: httpx.HTTPError) -> StreamError:
    return collector.error(f"The connection broke in the middle of the stream: {error!r}")
