"""Files that are there whole or not at all (no torch)."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

__all__ = ["PRIVATE", "write_atomically"]

PRIVATE = 0o600
"""Only the owner may read and write."""


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file in one step: who reads it sees the one before or the new one, never a part.

    Args:
        path: replaced if it is there.
        content: all of the file.
        mode: the permissions, less those that the umask takes away.

    Raises:
        OSError: it cannot be written; what was there stays, and no draft is left behind.
    """
    draft = path.with_name(f".writing-{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave the new name with no content
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise
