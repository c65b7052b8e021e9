"""Rows of a data file, each with the place it stands at, so that an error can name it.

``.jsonl`` has one JSON object a line, ``.json`` a list of objects (or lines as well: what counts is
how the file begins), ``.txt`` is one plain document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sortserve_trainer.data.source import bad_data

__all__ = ["SUFFIXES", "Row", "json_kind", "read_rows"]

SUFFIXES = (".json", ".jsonl", ".txt")
"""Of the files that can be read."""

_SPACE = re.compile(r"[ \t\r\n]*")
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class Row(NamedTuple):
    """One row, not yet checked."""

    place: str
    """``path:12``: file and line."""
    fields: dict[str, Any]
    """Values by column."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order; lines with nothing in them are none.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or has a line that is no JSON object.
    """
    text = _read_text(path)
    if path.suffix == ".txt":
        yield Row(f"{path}:1", {"text": text})
    elif text.startswith("[", _skip_space(text, 0)):
        yield from _read_list(path, text)
    else:
        yield from _read_lines(path, text)


def json_kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    return _KINDS.get(type(value), type(value).__name__)


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise bad_data(str(path), "cannot be read: it is no regular file")
        data = path.read_bytes()
    except OSError as error:
        raise bad_data(str(path), f"cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{data[error.start]:02x} is not UTF-8: save the file in that encoding"
        raise bad_data(f"{path}:{line}", problem) from error


def _read_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise bad_data(place, f"not a JSON object on one line: {_reason(error)}") from error
            yield Row(place, _check_object(value, place))


def _read_list(path: Path, text: str) -> Iterator[Row]:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise bad_data(f"{path}:{line}", f"not valid JSON: {_reason(error)}") from error
    # It is valid. Now element by element, since the parser keeps no line numbers.
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _skip_space(text, text.index("[") + 1)
    while text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        value, end = decoder.raw_decode(text, position)
        yield Row(place, _check_object(value, place))
        position = _skip_space(text, end)
        if text[position] == ",":
            position = _skip_space(text, position + 1)


def _check_object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_data(place, f"a row is a JSON object, not {json_kind(value)}")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()
