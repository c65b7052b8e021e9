"""How a body may be written: compressed, with a byte-order mark, whole numbers as ``4.0``."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any

from sortserve.api.problems import shortened
from sortserve.core.errors import InvalidRequestError, PayloadTooLargeError

__all__ = ["decompressed", "is_compressed", "without_mark", "without_points"]

_MARK = b"\xef\xbb\xbf"
_OF_NUMBERS = frozenset({"budget", "prompt", "stop_token_ids", "tokens"})
"""Fields that may hold whole numbers further in. In all others what is nested is the client's own
(messages, variables of the template, schemas): it is left as it was written."""
_MOST_EXACT = float(2**53)
"""Below it every whole number has a float of its own."""


def is_compressed(content_encoding: str) -> bool:
    """Whether a body is to be decompressed.

    Raises:
        InvalidRequestError: in a way that is not known here.
    """
    encoding = content_encoding.strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise InvalidRequestError(
            f"Content-Encoding={shortened(content_encoding)} is not allowed: send the body as it "
            "is, or with gzip.",
            param="content-encoding",
            code="unsupported_content_encoding",
        )
    return encoding in ("gzip", "x-gzip")


def decompressed(content: bytes, max_bytes: int) -> bytes:
    """What gzip has made small. No more than ``max_bytes`` and one are ever in memory.

    Raises:
        InvalidRequestError: it is no gzip, or its end is missing.
        PayloadTooLargeError: it is larger.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            body = stream.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidRequestError(
            f"The body is not valid gzip, as Content-Encoding says it is: {error}.",
            param="content-encoding",
            code="invalid_gzip",
        ) from None
    if len(body) > max_bytes:
        raise PayloadTooLargeError(
            f"The body is over the limit of {max_bytes} bytes once it is decompressed."
        )
    return body


def without_mark(content: bytes) -> bytes:
    """The text without the byte-order mark that some editors and clients put before it."""
    return content.removeprefix(_MARK)


def without_points(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a body with whole numbers as integers, however they were written.

    ``4.0`` is an integer to JSON, and languages with one type of number write it so.
    """
    return {
        name: _deep(value) if name in _OF_NUMBERS else _flat(value)
        for name, value in fields.items()
    }


def _flat(value: Any) -> Any:
    is_whole = type(value) is float and value.is_integer() and abs(value) <= _MOST_EXACT
    return int(value) if is_whole else value


def _deep(value: Any) -> Any:
    if isinstance(value, list):
        return [_deep(item) for item in value]
    if isinstance(value, dict):
        return {name: _deep(item) for name, item in value.items()}
    return _flat(value)
