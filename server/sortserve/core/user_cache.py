"""Where things that are costly to make are kept between starts (no torch).

What is kept here is run (compiled kernels) or served (converted weights), so it is only used if
nobody else can have written it: the folder belongs to this user or to root, nobody else may write
to it, and it is no link to somewhere else. Each file belongs to its owner alone and goes with a
digest of its content, which finds what a full disk, a killed process or a bad disk left behind.
Whoever may write to the folder as this user could replace both; no file of ours can prevent that.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import stat
from pathlib import Path

__all__ = [
    "file_digest",
    "is_private",
    "make_private",
    "open_user_cache",
    "user_cache_dir",
]

logger = logging.getLogger(__name__)

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_said: set[str] = set()
"""Warnings of this process: three parts ask for one folder, and one line is enough."""


def user_cache_dir() -> Path | None:
    """``SORTSERVE_CACHE_DIR``, else ``sortserve`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        The folder, which need not exist; None for a user without a home.
    """
    try:
        if named := os.environ.get("SORTSERVE_CACHE_DIR"):
            return Path(named).expanduser()
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no HOME, and no entry in /etc/passwd either
        return None
    return caches / "sortserve"


def open_user_cache(folder: Path | None = None) -> Path | None:
    """The cache folder, made now if need be; None, and one warning, if it cannot be trusted.

    Args:
        folder: default: ``user_cache_dir()``.
    """
    folder = folder or user_cache_dir()
    fault = _fault_of(folder)
    if fault is None:
        return folder
    text = f"no cache, nothing is kept between starts: {fault}."
    if text not in _said:
        _said.add(text)
        logger.warning(text)
    return None


def _fault_of(folder: Path | None) -> str | None:
    """Why a folder cannot be the cache; None if it can, and then it is there."""
    if folder is None:
        return "this user has no home folder; SORTSERVE_CACHE_DIR names one"
    try:
        make_private(folder)
        if is_private(folder, stat.S_IFDIR):
            return None
    except (OSError, ValueError) as error:
        return f"{folder} cannot be used ({getattr(error, 'strerror', None) or error})"
    return (
        f"{folder} is not used, because somebody else could have put a file into it: it must be a "
        "folder, not a link, belong to this user, and be writable by nobody else. Delete it, or "
        "name another in SORTSERVE_CACHE_DIR"
    )


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter; parents as usual. An old one is left as it is.

    Raises:
        OSError: it cannot be made.
    """
    if not os.path.lexists(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def is_private(path: Path, kind: int = stat.S_IFREG) -> bool:
    """Whether a path is there, of this kind (links not followed), and not for others to write.

    Args:
        path: a file or folder.
        kind: ``stat.S_IFREG`` or ``stat.S_IFDIR``.

    Raises:
        OSError: it cannot be looked at, though it may be there.
    """
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (
        stat.S_IFMT(status.st_mode) == kind
        and status.st_uid in {0, os.geteuid()}
        and not status.st_mode & _OTHERS_MAY_WRITE
    )


def file_digest(path: Path, *, is_ours: bool = False) -> str:
    """The sha256 of a file: some 1.6 GB/s where the processor has instructions for it.

    Args:
        path: of the file.
        is_ours: nobody shortens it meanwhile, which would end the process. It is mapped into memory
            then and read in one go: reading it piece by piece waits for the interpreter at every
            piece, and another thread may load a tokenizer, without letting go of it.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        if not is_ours or os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return hashlib.file_digest(file, "sha256").hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()
