"""Clients that break the rules, or leave: what they do to a server while others are served."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.lib.faulty_process import FaultyProcess
from benchmarks.lib.http_client import HttpClient, HttpConnection, encode_request

__all__ = [
    "KEY",
    "KEYS_FILE",
    "ask",
    "big_requests",
    "garbage",
    "half_open",
    "header_floods",
    "leave_once",
    "mute_collector",
    "pipelined",
    "resets_in_mid_body",
    "resets_in_mid_stream",
    "slow_loris",
    "slow_readers",
]

KEY = "key-of-the-chaos-benchmark"
KEYS_FILE = f"keys:\n  - name: chaos\n    sha256: {hashlib.sha256(KEY.encode()).hexdigest()}\n"
BODY = {"prompt": "rude", "max_tokens": 400, "ignore_eos": True, "stream": True}
PATIENCE_S = 20.0


async def ask(
    client: HttpClient,
    *,
    chat: bool = False,
    structured: str | None = None,
    patience_s: float = PATIENCE_S,
    **fields: Any,
) -> int:
    """The status of a small good request on a connection of its own; 0 if there is no answer."""
    body: dict[str, Any] = {"max_tokens": 4, "temperature": 0, **fields}
    if chat:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        body.setdefault("prompt", "Hello")
    if structured is not None:
        body["structured_outputs"] = {"regex": structured}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    headers = {"authorization": f"Bearer {KEY}"}
    data = encode_request("POST", path, json.dumps(body).encode(), headers)
    try:
        async with asyncio.timeout(patience_s):
            connection = await HttpConnection.open(client.host, client.port)
            try:
                return (await connection.request(data)).status
            finally:
                connection.close()
    except (OSError, TimeoutError):
        return 0


async def big_requests(client: HttpClient, count: int = 6) -> list[int]:
    """Prompts that are too long, and large enough to be read on a thread."""
    return list(
        await asyncio.gather(*(ask(client, prompt="long " * 100_000) for _ in range(count)))
    )


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


async def _each(server: FaultyProcess, count: int, talk: Talk, *, reset: bool = False) -> None:
    async def one() -> None:
        host, port = server.client.host, server.client.port
        with suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await talk(reader, writer)
            finally:
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                writer.close()

    await asyncio.gather(*(one() for _ in range(count)))


def _request(body: dict[str, Any] = BODY) -> bytes:
    return encode_request("POST", "/v1/completions", json.dumps(body).encode())


async def half_open(server: FaultyProcess) -> None:
    """Connections that say nothing, and whose other end is shut."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n")
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        await reader.read()

    await _each(server, 40, talk)


async def slow_loris(server: FaultyProcess) -> None:
    """A byte of the headers now and then, until it is cut."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in _request():
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.1)
            if reader.at_eof():
                return

    await _each(server, 20, talk)


async def resets_in_mid_body(server: FaultyProcess) -> None:
    """Half of the body, then a reset."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = _request()
        writer.write(data[: len(data) - 30])
        await writer.drain()
        await asyncio.sleep(0.05)

    await _each(server, 40, talk, reset=True)


async def resets_in_mid_stream(server: FaultyProcess) -> None:
    """Some of the answer, then a reset."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_request())
        await reader.read(500)

    await _each(server, 40, talk, reset=True)


async def header_floods(server: FaultyProcess) -> None:
    """Headers without an end."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n")
        for number in range(20_000):
            writer.write(b"X-%d: %s\r\n" % (number, b"x" * 100))
            await writer.drain()
            if reader.at_eof():
                return

    await _each(server, 10, talk)


async def pipelined(server: FaultyProcess) -> None:
    """Requests sent ahead on one connection, more than are allowed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_request({**BODY, "max_tokens": 4, "stream": False}) * 60)
        await writer.drain()
        writer.write_eof()
        await reader.read()

    await _each(server, 1, talk)


async def slow_readers(server: FaultyProcess) -> None:
    """Clients that ask for a long answer and read none of it."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        writer.write(_request({**BODY, "n": 8}))
        await writer.drain()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(3.0)

    await _each(server, 10, talk, reset=True)


async def garbage(server: FaultyProcess) -> None:
    """Bytes of other protocols, and of none."""
    starts = (b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", os.urandom(4000))

    async def say(data: bytes) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            await reader.read()

        await _each(server, 10, talk)

    await asyncio.gather(*(say(data) for data in starts))


async def leave_once(server: FaultyProcess) -> None:
    """One client that leaves in mid-stream."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_request())
        await reader.read(500)

    await _each(server, 1, talk, reset=True)


def mute_collector(folder: Path) -> dict[str, str]:
    """A trace collector that takes connections and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def take() -> None:
        while True:
            held.append(listener.accept()[0])

    threading.Thread(target=take, name="mute collector", daemon=True).start()
    port = listener.getsockname()[1]
    return {
        "SORTSERVE_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
