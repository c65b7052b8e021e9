"""A server protocol on a loopback port, and clients that send bytes as they please."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from sortserve.api.http.limits import ConnectionLimits
from sortserve.api.http.protocol import HttpProtocol

WAIT_S = 30


@dataclass
class App:
    """Reads each body and answers with it; a test may hold the answers, and sees who left."""

    held: bool = False
    answer: bytes | None = None
    """Instead of the body."""
    num_asked: int = 0
    num_left: int = 0
    scopes: list[Scope] = field(default_factory=list)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_asked += 1
        self.scopes.append(scope)
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return self._leave()
            body += message["body"]
            if not message["more_body"]:
                break
        self.asked.set()
        if self.held:
            gone = asyncio.ensure_future(receive())
            free = asyncio.ensure_future(self.may_answer.wait())
            await asyncio.wait([gone, free], return_when=asyncio.FIRST_COMPLETED)
            free.cancel()
            if gone.done():
                return self._leave()
            gone.cancel()
        body = body if self.answer is None else self.answer
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _leave(self) -> None:
        self.num_left += 1
        self.left.set()


@dataclass
class RawClient:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self) -> Reply:
        """The next answer, interim ones skipped."""
        async with asyncio.timeout(WAIT_S):
            while True:
                head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                line, *rest = head.rstrip("\r\n").split("\r\n")
                status = int(line.split(" ")[1])
                if status != 100:
                    break
            headers = {k.lower(): v for k, _, v in (item.partition(": ") for item in rest)}
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self._chunks()
        return Reply(status, headers, body)

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return body

    async def rest(self) -> bytes:
        """Everything up to the end of the connection, which must come."""
        async with asyncio.timeout(WAIT_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


@dataclass
class RawServer:
    """A running server; ``state.connections`` are its live protocols."""

    app: App
    state: ServerState
    address: tuple[str, int]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[RawClient]:
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            yield RawClient(reader, writer)
        finally:
            writer.transport.abort()

    async def connected(self, count: int) -> None:
        """Wait until so many connections are open."""
        async with asyncio.timeout(WAIT_S):
            while len(self.state.connections) != count:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def raw_server(
    asgi: ASGIApp | None = None,
    *,
    limits: ConnectionLimits | None = None,
    cors_allow_origins: Sequence[str] = (),
) -> AsyncIterator[RawServer]:
    app, state = App(), ServerState()
    config = uvicorn.Config(
        app if asgi is None else asgi, log_config=None, lifespan="off", ws="none"
    )
    config.load()
    values = limits or ConnectionLimits()

    def protocol() -> HttpProtocol:
        return HttpProtocol(config, state, {}, limits=values, cors_allow_origins=cors_allow_origins)

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    try:
        yield RawServer(app, state, server.sockets[0].getsockname())
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.gather(*state.tasks)
