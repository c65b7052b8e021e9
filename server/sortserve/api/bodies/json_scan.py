"""Counting what a JSON text holds before anything is built of it.

A parser makes objects of a hundred bytes out of ``[],`` and holds the interpreter while it does:
4 MiB of that are a fifth of a second and a hundred megabytes. The scan builds nothing, lets other
threads run between any two steps, and stops at the first limit that is passed. It need not
understand what is no JSON: the parser refuses that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from sortserve.api.bodies.limits import (
    MAX_FIELDS,
    MAX_KEY_CHARS,
    MAX_NUMBER_CHARS,
    BodyLimits,
    FieldLimit,
)
from sortserve.api.problems import unknown_field
from sortserve.core.errors import InvalidRequestError

__all__ = ["check_size"]

_START = re.compile(rb"[ \t\r\n]*+\{")
_LONG_NUMBER = re.compile(rb'[ \t\r\n\[\]{},:"][^ \t\r\n,:]{%d}' % (MAX_NUMBER_CHARS + 1))
"""Begins where a number may begin, so that no byte is looked at twice."""
_STRUCTURE = re.compile(rb'[\[\]{}"]')
_PIECE_OF_STRING = re.compile(rb'(?:[^"\\]{1,4096}+|\\.){1,64}+', re.DOTALL)
"""Possessive and bounded: a match never goes back, and never holds the interpreter for long."""
_CONTINUATION = bytes(range(0x80, 0xC0))
"""Bytes that begin no character of UTF-8."""
_BLOCK_BYTES = 1 << 16
"""What is looked at in one call: other threads run between two."""
_QUOTE, _LIST, _OBJECT = b'"[{'


def check_size(
    text: bytes, limits: BodyLimits, *, known_fields: Mapping[str, Any] | None = None
) -> None:
    """Refuse a JSON object that holds more than the limits allow, without reading it into memory.

    Args:
        text: the body.
        limits: of this server.
        known_fields: the only names that the object may have; None: any.

    Raises:
        InvalidRequestError: it is no object, has an unknown field, or holds more; ``param`` is the
            field, or the dotted path of the string or number.
    """
    if not _START.match(text):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    _Scan(text, limits, known_fields).run()


@dataclass
class _Counts:
    """What has been seen of one field, or of all fields that share a limit."""

    limit: FieldLimit
    num_values: int = 0
    num_numbers: int = 0
    num_chars: int = 0


class _Scan:
    def __init__(
        self, text: bytes, limits: BodyLimits, known_fields: Mapping[str, Any] | None
    ) -> None:
        self._text = text
        self._known_fields = known_fields
        self._counts = {name: _Counts(limit) for name, limit in limits.fields.items()}
        self._others = _Counts(limits.others)
        self._of_field = self._others
        self._num_fields = 0
        self._path: list[str | int] = []
        """The key or the index in each list and object around the present position."""
        self._awaits_key = False

    def run(self) -> None:
        text, at, gap = self._text, 0, 0
        while at < len(text):
            match = _STRUCTURE.search(text, at, at + _BLOCK_BYTES)
            stop = match.start() if match else min(at + _BLOCK_BYTES, len(text))
            self._pass_by(gap, at, stop)
            if match is None:
                at = stop
                continue
            byte, at = text[stop], stop + 1
            if byte == _QUOTE:
                end = _end_of_string(text, at)
                if end is None:
                    return
                self._take_string(at, end)
                at = end + 1
            elif byte in (_LIST, _OBJECT):
                self._open(0 if byte == _LIST else "")
            else:
                self._path.pop()
                self._awaits_key = False
                if not self._path:
                    return  # the object has ended: the parser refuses whatever follows
            gap = at

    def _pass_by(self, gap: int, start: int, end: int) -> None:
        """Go over numbers, constants, colons, commas and space; ``gap`` is where they began."""
        if end - gap > MAX_NUMBER_CHARS:
            begin = max(gap - 1, start - 1 - MAX_NUMBER_CHARS, 0)
            long_number = _LONG_NUMBER.search(self._text, begin, end)
            if long_number is not None:
                self._next_entries(self._text.count(b",", start, long_number.start() + 1))
                path = self._dotted_path()
                raise InvalidRequestError(
                    f"{path} is not allowed: a number may have {MAX_NUMBER_CHARS} characters.",
                    param=path,
                )
        self._next_entries(self._text.count(b",", start, end))

    def _open(self, place: str | int) -> None:
        self._count_value()
        self._path.append(place)
        self._awaits_key = place == ""
        counts = self._of_field
        if len(self._path) > counts.limit.max_depth + 1:
            raise self._refusal(f"may be nested {counts.limit.max_depth} deep")

    def _next_entries(self, num_commas: int) -> None:
        if not num_commas or not self._path:
            return
        place = self._path[-1]
        if isinstance(place, int):
            self._path[-1] = place + num_commas
        else:
            self._awaits_key = True
        if len(self._path) > 1:
            counts = self._of_field
            counts.num_numbers += num_commas
            if counts.num_numbers >= counts.limit.max_numbers:
                raise self._refusal(f"may have {counts.limit.max_numbers} entries")

    def _take_string(self, start: int, end: int) -> None:
        if self._awaits_key:
            self._take_key(start, end)
            return
        self._count_value()
        counts, limit = self._of_field, self._of_field.limit
        num_chars = _count_chars(self._text, start, end, limit.max_string_chars)
        counts.num_chars += num_chars
        if num_chars > limit.max_string_chars:
            path = self._dotted_path()
            raise InvalidRequestError(
                f"{path} is too long: it may have {limit.max_string_chars} characters.",
                param=path,
                code=limit.code,
            )
        if counts.num_chars > limit.max_chars:
            raise self._refusal(f"may hold {limit.max_chars} characters", code=limit.code)

    def _take_key(self, start: int, end: int) -> None:
        self._awaits_key = False
        key = _key(self._text[start : min(end, start + MAX_KEY_CHARS)])
        self._path[-1] = key
        if end - start > MAX_KEY_CHARS:
            raise InvalidRequestError(
                f"The name {key[:40]}... is too long: names may have {MAX_KEY_CHARS} bytes.",
                param=self._dotted_path(),
            )
        if len(self._path) == 1:
            self._begin_field(key)
        else:
            self._count_value()

    def _begin_field(self, name: str) -> None:
        if self._known_fields is not None and name not in self._known_fields:
            raise unknown_field(name, self._known_fields)
        self._of_field = self._counts.get(name, self._others)
        self._num_fields += 1
        if self._num_fields > MAX_FIELDS:
            raise InvalidRequestError(
                f"{name} is one field too many: a body may have {MAX_FIELDS}.", param=name
            )

    def _count_value(self) -> None:
        if not self._path:
            return  # the body itself
        counts = self._of_field
        counts.num_values += 1
        if counts.num_values > counts.limit.max_values:
            raise self._refusal(f"may hold {counts.limit.max_values} strings, lists and objects")

    def _refusal(self, what: str, code: str | None = None) -> InvalidRequestError:
        field = str(self._path[0])
        shared = " together with the other small fields" if self._of_field is self._others else ""
        message = f"{field} is too large: it {what}{shared}."
        return InvalidRequestError(message, param=field, code=code)

    def _dotted_path(self) -> str:
        return ".".join(map(str, self._path))


def _key(raw: bytes) -> str:
    if b"\\" in raw:
        try:
            return str(from_json(b'"' + raw + b'"'))
        except ValueError:  # cut off within an escape, or no JSON
            pass
    return raw.decode(errors="replace")


def _end_of_string(text: bytes, start: int) -> int | None:
    """Where the quote is that ends the string which begins at ``start``; None: there is none."""
    end = text.find(b'"', start)
    if end < 0:
        return None
    at = text.find(b"\\", start, end)
    if at < 0:
        return end
    while match := _PIECE_OF_STRING.match(text, at):
        at = match.end()
    return at if text[at : at + 1] == b'"' else None


def _count_chars(text: bytes, start: int, end: int, enough: int) -> int:
    """Characters of a string; fewer where it has escapes. Counting stops beyond ``enough``."""
    num_chars = 0
    for at in range(start, end, _BLOCK_BYTES):
        block = text[at : min(at + _BLOCK_BYTES, end)]
        if not block.isascii():
            block = block.translate(None, _CONTINUATION)
        num_chars += len(block)
        if num_escapes := block.count(b"\\"):
            # Two bytes make a character, or six, or twelve; one escape may go over the border.
            num_chars -= num_escapes + (9 * block.count(b"\\u") + 1) // 2 + 6
        if num_chars > enough:
            break
    return max(0, num_chars)
