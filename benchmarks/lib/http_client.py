"""A minimal HTTP/1.1 client that costs the server little CPU (for loopback benchmarks).

The load generator shares two cores with the server it measures, so it must not do what a general
client does: no redirects, no cookies, no decoding of every event. `HttpConnection` is one socket,
`HttpClient` keeps connections alive between requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.lib.http_parse import ResponseParser

__all__ = ["HttpClient", "HttpConnection", "NoResponseError", "Response", "encode_request"]

MAX_IDLE_S = 3.0
"""Idle connections are dropped before servers close them (uvicorn: after 5 s)."""


class NoResponseError(ConnectionError):
    """The connection ended before the whole response had come."""


@dataclass(frozen=True)
class Response:
    """A finished response. ``body`` is empty where a callback took the pieces."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


def encode_request(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of one request. A ``content-length`` in ``headers`` replaces the true one."""
    fields = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(body)),
    } | dict(headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class HttpConnection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._body: list[bytes] = []
        self._on_body: Callable[[bytes], None] | None = None
        self._done: asyncio.Future[Response] | None = None
        self.idle_since_s = 0.0

    @classmethod
    async def open(cls, host: str, port: int) -> HttpConnection:
        """Connects.

        Raises:
            OSError: nobody listens there.
        """
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, host, port)
        return connection

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def request(
        self, request: bytes, on_body: Callable[[bytes], None] | None = None
    ) -> Response:
        """Sends ``request`` and waits for the whole response.

        ``on_body`` takes the pieces of a 200's body as they arrive. Cancelling the wait closes the
        connection, as an impatient client would.

        Raises:
            NoResponseError: the peer closed before the response was complete.
        """
        assert self._transport is not None, "the connection is open"
        self._parser, self._body, self._on_body = ResponseParser(), [], on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            response = await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._done = None
        if response.headers.get("connection", "").lower() == "close":
            self.close()
        return response

    @property
    def response_started(self) -> bool:
        """Whether a byte of the present response has come."""
        return self._parser.started

    def close(self) -> None:
        """Closes without waiting; bytes not yet sent are dropped."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the socket is connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes have come."""
        piece = self._parser.feed(data)
        if piece and self._on_body is not None and self._parser.status == 200:
            self._on_body(piece)
        elif piece:
            self._body.append(piece)
        if self._parser.complete:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the socket is closed."""
        self._parser.feed_eof()
        if self._parser.complete:
            self._finish()
        elif self._done is not None and not self._done.done():
            self._done.set_exception(NoResponseError(f"connection lost: {exc or 'closed'}"))

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            parser = self._parser
            self._done.set_result(Response(parser.status, parser.headers, b"".join(self._body)))


class HttpClient:
    """Requests to one server over as many kept-alive connections as there are requests at once."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"--url={url!r} is not allowed: give http://HOST:PORT.")
        self.host, self.port = parts.hostname, parts.port or 80
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._idle: list[HttpConnection] = []

    def authorise(self, api_key: str) -> None:
        """Send this key from now on."""
        self._headers["authorization"] = f"Bearer {api_key}"

    @property
    def headers(self) -> Mapping[str, str]:
        """What every request carries."""
        return self._headers

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        on_body: Callable[[bytes], None] | None = None,
    ) -> Response:
        """One request; a kept-alive connection that the server has just closed is replaced once.

        Raises:
            OSError: no connection, or it was lost before the response was complete.
        """
        data = encode_request(method, path, body, self._headers | dict(headers or {}))
        connection, reused = await self._acquire()
        try:
            response = await connection.request(data, on_body)
        except NoResponseError:
            if not reused or connection.response_started:
                raise
            connection = await HttpConnection.open(self.host, self.port)
            response = await connection.request(data, on_body)
        if connection.is_open:
            connection.idle_since_s = asyncio.get_running_loop().time()
            self._idle.append(connection)
        return response

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _acquire(self) -> tuple[HttpConnection, bool]:
        oldest_s = asyncio.get_running_loop().time() - MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since_s >= oldest_s:
                return connection, True
            connection.close()
        return await HttpConnection.open(self.host, self.port), False
