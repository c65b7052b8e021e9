"""A server that ends waits for clients to take what it answers them, and for nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive, Scope, Send

from sortserve.process.config import load_settings
from sortserve.process.http_server import HttpServer, http_server
from sortserve.process.listening import listening
from support.patient_loop import patient

LARGE = 16 << 20
"""More bytes than the system holds for a client that does not read."""
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def answer_with_much(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * LARGE})


@asynccontextmanager
async def server_and_client() -> AsyncIterator[tuple[HttpServer, Streams]]:
    settings = load_settings({"port": 0, "write_timeout": 1e6})
    with listening(settings) as listener:
        server = http_server(settings, answer_with_much, listener, None)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=1024)
        try:
            yield server, (reader, writer)
        finally:
            writer.transport.abort()
            server.should_exit = True
            await serving


@patient
async def test_an_answer_is_waited_for_until_it_is_read() -> None:
    async with server_and_client() as (server, (reader, writer)):
        writer.write(HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        waiting = asyncio.create_task(server.answers_taken(30))
        await asyncio.sleep(1)
        assert not waiting.done()

        assert len(await reader.read(-1)) > LARGE
        assert await waiting


@patient
async def test_an_answer_is_not_waited_for_beyond_the_time() -> None:
    async with server_and_client() as (server, (reader, writer)):
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")

        assert not await server.answers_taken(1)


@patient
async def test_what_is_no_answer_is_not_waited_for() -> None:
    """Connections without a request, and a request of which something is still to come."""
    async with server_and_client() as (server, (_, writer)):
        began = asyncio.get_running_loop().time()
        assert await server.answers_taken(30)

        writer.write(HEAD + b"Content-Length: 10\r\n\r\nhalf")
        await asyncio.sleep(1)
        assert await server.answers_taken(30)
        assert asyncio.get_running_loop().time() - began < 10
