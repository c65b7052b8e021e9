"""What a client may hold before it has agreed on TLS: until then our protocol hears nothing."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from starlette.responses import PlainTextResponse

from sortserve.api.http.protocol import RESERVED_CONNECTIONS
from sortserve.process.config import load_settings
from sortserve.process.http_server import http_server
from sortserve.process.listening import listening, tls_context
from support.patient_loop import patient
from support.tls import write_tls_files

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def tls_server(folder: Path, **flags: object) -> AsyncIterator[int]:
    """The port of a server that answers everything with ``hi``."""
    certificate, key = write_tls_files(folder)
    files = {"ssl_certfile": certificate, "ssl_keyfile": key}
    settings = load_settings({"port": 0, **files, **flags})
    with listening(settings) as listener:
        server = http_server(settings, PlainTextResponse("hi"), listener, tls_context(settings))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def connected(port: int, *, with_tls: bool) -> AsyncIterator[Streams]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    tls = context if with_tls else None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)  # it is closed in the next turn of the loop


async def rest(streams: Streams) -> bytes:
    try:
        return await streams[0].read()
    except ConnectionResetError:
        return b""


@patient
async def test_who_never_begins_tls_has_no_longer_than_for_headers(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with (
        tls_server(tmp_path, header_timeout=5) as port,
        connected(port, with_tls=False) as silent,
    ):
        began = loop.time()

        assert await rest(silent) == b""
        assert 4 < loop.time() - began < 6  # of the loop's own time, which nobody waits for


@patient
async def test_connections_count_before_they_have_agreed_on_tls(tmp_path: Path) -> None:
    num_allowed = 3 + 2 * RESERVED_CONNECTIONS
    async with tls_server(tmp_path, max_connections=3) as port, AsyncExitStack() as stack:
        first, *_ = [
            await stack.enter_async_context(connected(port, with_tls=False))
            for _ in range(num_allowed)
        ]
        async with connected(port, with_tls=False) as one_more:
            assert await rest(one_more) == b""
            assert asyncio.get_running_loop().time() < 5  # and not because it was too slow

        first[1].write_eof()
        assert await rest(first) == b""

        async with connected(port, with_tls=True) as streams:
            streams[1].write(REQUEST)
            assert (await rest(streams)).endswith(b"hi")
