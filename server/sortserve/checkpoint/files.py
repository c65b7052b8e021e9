"""Files of a checkpoint folder, opened with care: whoever made the folder may have made a mistake.

Opening a FIFO waits for a writer for ever, a device or a huge file eats the memory. So a file is
looked at before it is opened, here for what we read ourselves and in ``check_folder`` for what a
library is going to read.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from sortserve.core.errors import CheckpointError

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "check_folder",
    "check_regular",
    "read_bytes",
    "read_json",
    "read_optional_json",
]

_MIB = 1 << 20
MAX_DOCUMENT_BYTES = 16 * _MIB
"""Largest JSON document that is parsed here; real ones have some KiB."""
MAX_TOKENIZER_BYTES = 256 * _MIB
"""Largest tokenizer or template file that a library is given; real ones have up to 40 MiB."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_TEXTS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_WEIGHTS = (".safetensors", ".bin", ".pth")
_FOLDERS_READ = ("additional_chat_templates",)


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Refuse what is no regular file, links followed, or is too large; it is not opened.

    Raises:
        CheckpointError: there is no such file, it is of another kind, or over ``max_bytes``.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        dangling = isinstance(error, FileNotFoundError) and path.is_symlink()
        reason = "its link leads nowhere" if dangling else _reason(error)
        raise CheckpointError(f"{path} cannot be read: {reason}.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise CheckpointError(f"{path} is {kind}, not a regular file.")
    if max_bytes is not None and status.st_size > max_bytes:
        raise CheckpointError(
            f"{path} has {status.st_size / _MIB:.0f} MiB; at most {max_bytes // _MIB} MiB are read."
        )


def read_bytes(path: Path, max_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The contents of a regular file.

    Raises:
        CheckpointError: the file is missing, unreadable, too large or not a regular file.
    """
    check_regular(path, max_bytes)
    try:
        with path.open("rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}.") from error


def read_json(path: Path, max_bytes: int = MAX_DOCUMENT_BYTES) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable, too large, or no JSON object.
    """
    data = read_bytes(path, max_bytes)
    try:
        document = json.loads(data.decode())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is not valid JSON: it is nested too deeply.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return document


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file.

    Raises:
        CheckpointError: as ``read_json``.
    """
    return read_json(path) if os.path.lexists(path) else {}


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds, under a name a library may open, anything but a regular file.

    Raises:
        CheckpointError: a FIFO, socket or device under any name; a folder, a link that leads
            nowhere, or an oversized file under the name of a text or of weights.
    """
    for path in _entries(folder):
        if path.suffix in _TEXTS:
            check_regular(path, MAX_TOKENIZER_BYTES)
        elif path.suffix in _WEIGHTS or not (path.is_dir() or path.is_symlink()):
            check_regular(path)
        elif path.name in _FOLDERS_READ:
            check_folder(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
