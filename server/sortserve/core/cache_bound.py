"""The bound of the user's cache: what was used longest ago goes, never what is in use (no torch).

An entry is in use as long as a process holds a shared lock on it (``hold``). Whoever removes one
locks it for himself first, so that nobody begins to read what is about to go. What is mapped into
memory or loaded outlives its name anyway: a lock saves the next start the work, not this one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sortserve.core.errors import ConfigError

__all__ = ["CACHE_SIZE_VARIABLE", "cache_size_bytes", "held", "hold", "prune"]

logger = logging.getLogger(__name__)

CACHE_SIZE_VARIABLE = "SORTSERVE_CACHE_SIZE"
DEFAULT_SIZE = "20GiB"
MAX_SMALL = 256
"""Calibrations: some KiB each."""
MAX_LARGE = 64
"""All other entries."""
MAX_DRAFT_AGE_S = 24 * 3600.0
"""A draft that nobody has written to for so long was left behind by a process that was killed."""

_CALIBRATIONS = "calibration"
_LARGE = re.compile(
    r"kernels-.+\.so"  # compiled
    r"|weights-[0-9a-f]+-[0-9a-f]+\.safetensors"  # as they are served
    r"|.+-[0-9a-f]{16}"  # a folder converted from GGUF
)
_SMALL = re.compile(r"[0-9a-f]+\.json")
_DRAFT = re.compile(r"\.(converting|writing|removing)-.+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_held: dict[tuple[int, int], int] = {}
"""Descriptors of what this process uses until it ends, by device and inode."""


def cache_size_bytes() -> int:
    """Most bytes that the cache takes: ``SORTSERVE_CACHE_SIZE``, else 20 GiB.

    Raises:
        ConfigError: the variable is no size.
    """
    text = os.environ.get(CACHE_SIZE_VARIABLE) or DEFAULT_SIZE
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{CACHE_SIZE_VARIABLE}={text!r} is no size: give bytes, or a number with a unit such "
            f"as {DEFAULT_SIZE} or 500MB.",
            param=CACHE_SIZE_VARIABLE,
        )
    number, unit = float(match[1]), (match[2] or "B").lower()
    base = 1024 if "i" in unit else 1000
    return int(number * base ** _POWERS.get(unit[0], 0))


def hold(path: Path) -> bool:
    """Keep an entry from being removed until this process ends, and mark it as used now.

    Returns:
        Whether it is there and nobody is removing it.
    """
    descriptor = _lock(path, fcntl.LOCK_SH)
    if descriptor is None:
        return False
    status = os.fstat(descriptor)
    if _held.setdefault((status.st_dev, status.st_ino), descriptor) != descriptor:
        os.close(descriptor)  # one lock is enough, however often a process loads the same
    return True


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """``hold``, until the ``with`` block ends."""
    descriptor = _lock(path, fcntl.LOCK_SH)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def prune(cache: Path) -> None:
    """Remove what was used longest ago until the cache is within its bounds; never a failure.

    What is not named as an entry of the cache is left alone, whatever its size.

    Args:
        cache: a folder that ``open_user_cache`` has accepted.
    """
    large, drafts = _entries(cache, _LARGE), _entries(cache, _DRAFT)
    small = _entries(cache / _CALIBRATIONS, _SMALL)
    drafts += _entries(cache / _CALIBRATIONS, _DRAFT)
    too_old = time.time() - MAX_DRAFT_AGE_S
    for draft in drafts:
        if draft.used_s < too_old:
            _remove(draft.path)
    _keep_within(small, MAX_SMALL, 64 * 2**20)
    _keep_within(large, MAX_LARGE, cache_size_bytes())


@dataclass(frozen=True)
class _Entry:
    path: Path
    num_bytes: int
    used_s: float
    """When it was last used, in seconds of the clock of the file system."""


def _keep_within(entries: list[_Entry], max_entries: int, max_bytes: int) -> None:
    num_entries, num_bytes = len(entries), sum(entry.num_bytes for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.used_s):
        if num_entries <= max_entries and num_bytes <= max_bytes:
            return
        if _remove(entry.path):
            num_entries, num_bytes = num_entries - 1, num_bytes - entry.num_bytes
            logger.info("%s is removed from the cache, to make room", entry.path.name)


def _entries(folder: Path, name: re.Pattern[str]) -> list[_Entry]:
    """What is in a folder under such a name and belongs to us; what vanishes meanwhile is not."""
    found: list[_Entry] = []
    with suppress(OSError):
        for path in folder.iterdir():
            if name.fullmatch(path.name) is None:
                continue
            with suppress(OSError):
                status = path.lstat()
                parts = path.iterdir() if stat.S_ISDIR(status.st_mode) else [path]
                size = sum(part.lstat().st_size for part in parts)
                if status.st_uid == os.geteuid():
                    found.append(_Entry(path, size, status.st_mtime))
    return found


def _remove(path: Path) -> bool:
    """Remove an entry that nobody uses; False if somebody does, or it cannot be."""
    descriptor = _lock(path, fcntl.LOCK_EX)
    if descriptor is None:
        return False
    try:
        if path.is_dir():  # gone at once, under its name
            aside = path.with_name(f".removing-{path.name}")
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _lock(path: Path, kind: int) -> int | None:
    """A descriptor with a lock; None if the entry is not there or is locked by another process."""
    try:
        # Not blocking, so that a FIFO under the name of an entry holds nobody up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.lstat()):
            raise FileNotFoundError(path)  # removed or replaced while we waited for nobody
        if kind == fcntl.LOCK_SH:
            with suppress(OSError):  # a cache that we may only read
                os.utime(descriptor)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
