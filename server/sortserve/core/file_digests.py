"""Digests of files that may be large, remembered as long as a file is unchanged (no torch).

A file is taken for unchanged if its size, its times of change (the one that nobody can set
included) and its place on the disk are. One that was changed just now is read each time: two
changes within one tick of the file system's clock look like one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sortserve.core.atomic_write import PRIVATE, write_atomically
from sortserve.core.user_cache import file_digest, is_private

__all__ = ["SETTLED_S", "remembered_digests"]

FILE = "digests.json"
MAX_BYTES = 2**20
MAX_REMEMBERED = 512
SETTLED_S = 2.0
"""Coarsest tick of a clock of a file system that we know."""


def remembered_digests(files: list[Path], cache: Path | None) -> list[str]:
    """The sha256 of each file; links are followed.

    Args:
        files: that are there.
        cache: a folder that ``open_user_cache`` has accepted; None: all files are read.

    Raises:
        OSError: one cannot be read.
    """
    known = {} if cache is None else _read(cache / FILE)
    found: dict[str, Any] = {}
    digests: list[str] = []
    for file in files:
        path, facts = str(file.resolve()), _facts(file)
        entry = known.get(path)
        if isinstance(entry, dict) and entry.get("facts") == facts:
            digest = str(entry.get("sha256"))
        else:
            digest = file_digest(file)
            if _facts(file) == facts and time.time() - _changed_s(file) > SETTLED_S:
                found[path] = {"facts": facts, "sha256": digest}
        digests.append(digest)
    if found and cache is not None:
        _write(cache / FILE, {**{k: v for k, v in known.items() if k not in found}, **found})
    return digests


def _facts(file: Path) -> list[int]:
    status = file.stat()
    return [
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    ]


def _changed_s(file: Path) -> float:
    status = file.stat()
    return max(status.st_mtime, status.st_ctime)


def _read(path: Path) -> dict[str, Any]:
    try:
        if not is_private(path) or path.stat().st_size > MAX_BYTES:
            return {}
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _write(path: Path, entries: dict[str, Any]) -> None:
    """Two processes that write at once lose what one of them remembered, which is read again."""
    last = dict(list(entries.items())[-MAX_REMEMBERED:])
    try:
        write_atomically(path, json.dumps(last).encode(), mode=PRIVATE)
    except OSError:
        return  # a full disk or a cache that we may only read: the files are read at each start
