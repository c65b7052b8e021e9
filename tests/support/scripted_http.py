"""An HTTP server on loopback that answers every request with the same bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

__all__ = ["USAGE", "answer", "scripted_server", "token"]


def answer(*chunks: dict[str, Any] | str) -> bytes:
    events = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    body = b"".join(f"data: {event}\n\n".encode() for event in events)
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    return head + body


def token(text: str, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}]} | fields


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}


@asynccontextmanager
async def scripted_server(reply: bytes | None) -> AsyncIterator[str]:
    """Yields its URL; a reply of ``None`` closes without an answer."""

    handlers = set[asyncio.Task[None]]()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        while head := await _read_head(reader):
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                await reader.readexactly(length)
            if reply is None:
                break
            writer.write(reply)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.gather(*handlers)


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
