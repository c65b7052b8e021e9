"""JSON replies that may be large: written in pieces, and on a thread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.responses import Response

from sortserve.api.text_threads import TextThreads

__all__ = ["json_pieces", "json_reply"]

THREAD_FROM_VALUES = 512
"""Replies from so many values on are written on a thread: they would hold up every stream."""
VALUES_PER_PIECE = 256
MAX_WALKED_FIELDS = 32


async def json_reply(
    make: Callable[[], dict[str, Any]], num_values: int, threads: TextThreads
) -> Response:
    """The reply that ``make`` makes; both it and its JSON come from a thread if they are large."""

    def write() -> bytes:
        content = bytearray()
        for piece in json_pieces(make()):
            content += piece.encode()
        return bytes(content)

    if num_values < THREAD_FROM_VALUES:
        content = write()
    else:
        content = await threads.run(write, is_answer=True)
    return Response(content, media_type="application/json")


def json_pieces(value: object) -> Iterator[str]:
    """The JSON of a value, as strings that are each made in a short time.

    Python's encoder writes a whole value while no other thread can run. Here objects of few fields
    are cut into their fields, iterators into their items and lists into runs of entries: what a
    reply is made of.
    """
    if isinstance(value, dict) and len(value) <= MAX_WALKED_FIELDS:
        yield "{"
        for i, (key, item) in enumerate(value.items()):
            yield f"{',' if i else ''}{quoted(key)}:"
            yield from json_pieces(item)
        yield "}"
    elif isinstance(value, Iterator):
        yield "["
        for i, item in enumerate(value):
            yield "," if i else ""
            yield from json_pieces(item)
        yield "]"
    elif isinstance(value, list) and len(value) > VALUES_PER_PIECE:
        yield "["
        for start in range(0, len(value), VALUES_PER_PIECE):
            yield "," if start else ""
            yield _dumps(value[start : start + VALUES_PER_PIECE])[1:-1]
        yield "]"
    else:
        yield _dumps(value)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
