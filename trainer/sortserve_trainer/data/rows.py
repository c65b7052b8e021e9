"""Rows of a data file, each with the place it stands at, so that an error can name it.

``.jsonl`` has one JSON object a line, ``.json`` a list of objects (or lines as well: what counts is
how the file begins), ``.txt`` is one plain document; each may be compressed (``.gz``). ``.csv`` has
the names of its columns in its first line, and an empty field is an absent one. ``.parquet`` may
hold lists and objects in its columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from sortserve_trainer.data.source import bad_data

__all__ = ["SUFFIXES", "Row", "columnar_row", "data_suffix", "json_kind", "read_rows"]

SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".parquet")
"""Of the files that can be read; but for the last, ``.gz`` may follow."""
PARQUET, GZIP = ".parquet", ".gz"

_ANSWERS = {"output", "answers", "text"}
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
        ConfigError: the file cannot be read, is not UTF-8, or has a line that is no row.
    """
    suffix = data_suffix(path)
    if suffix == PARQUET:
        yield from _read_parquet(path)
        return
    text = _read_text(path)
    if suffix == ".csv":
        yield from _read_csv(path, text)
    elif suffix == ".txt":
        yield Row(f"{path}:1", {"text": text})
    elif text.startswith("[", _skip_space(text, 0)):
        yield from _read_list(path, text)
    else:
        yield from _read_lines(path, text)


def columnar_row(place: str, fields: dict[str, Any]) -> Row:
    """A row of a table whose nested objects have one set of fields in all rows (Arrow's).

    What a row did not say is null there: an argument that only another tool has would be learned
    as one that every call gives.
    """
    return Row(place, {name: _said(value) for name, value in fields.items()})


def _said(value: object) -> object:
    if isinstance(value, dict):
        return {name: _said(v) for name, v in value.items() if v is not None}
    return [_said(item) for item in value] if isinstance(value, list) else value


def json_kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    return _KINDS.get(type(value), type(value).__name__)


def data_suffix(path: Path) -> str:
    """What a file says it is: ``.jsonl`` of ``a.jsonl`` and of ``a.jsonl.gz``; "" if unknown."""
    name = path.name.lower()
    plain = name.removesuffix(GZIP)
    suffix = next((s for s in SUFFIXES if plain.endswith(s)), "")
    return "" if suffix == PARQUET and plain != name else suffix


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise bad_data(str(path), "cannot be read: it is no regular file")
        data = path.read_bytes()
        if path.name.lower().endswith(GZIP):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise bad_data(str(path), f"is no whole gzip file: {error}") from error
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


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    # A document of any length: the reader's bound, of the whole process, is for files unseen.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for fields in reader:
            place = f"{path}:{line + 1}"  # where the row begins: a field may have several lines
            line = reader.line_num
            if None in fields or None in fields.values():
                width = len(reader.fieldnames or ())
                raise bad_data(place, f"it has not {width} fields, as the first line has")
            # An empty answer is one; an empty field of another kind is none.
            empty = {name for name, value in fields.items() if not value} - _ANSWERS
            yield Row(place, {name: v for name, v in fields.items() if name not in empty})
    except csv.Error as error:
        raise bad_data(f"{path}:{line + 1}", f"not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        parquet = import_module("pyarrow.parquet")
        errors = import_module("pyarrow").ArrowException
    except ImportError as error:
        problem = "parquet files need a package more: pip install 'sortserve[train]'"
        raise bad_data(str(path), problem) from error
    try:
        if path.exists() and not path.is_file():
            raise bad_data(str(path), "cannot be read: it is no regular file")
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield columnar_row(f"{path}, row {number}", fields)
    except errors as error:
        raise bad_data(str(path), f"is no parquet file that can be read: {error}") from error
    except OSError as error:
        raise bad_data(str(path), f"cannot be read: {error.strerror or error}") from error


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
