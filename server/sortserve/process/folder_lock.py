"""One process at a time looks at what lies in a folder and replaces it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["folder_lock"]

POLL_S = 0.02


@contextmanager
def folder_lock(folder: Path, *, wait_s: float = 2.0) -> Iterator[None]:
    """Keep out whoever asks for the same; nobody else is.

    Raises:
        OSError: there is no such folder, or others have been in it for so long.
    """
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(round(wait_s / POLL_S)):
            with suppress(BlockingIOError):
                fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(POLL_S)
        else:
            raise OSError(errno.EBUSY, f"{folder} is locked by another program")
        yield
    finally:
        os.close(folder_fd)
