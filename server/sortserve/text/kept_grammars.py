"""Compiled grammars that are kept for who asks for the same again, bounded in number and in size.

A compiled grammar does not tell its size. It is reckoned from its source: from 50 to 90 KiB each,
and up to 110 bytes a character of a long schema or list of choices (measured with llguidance 1.9).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["MAX_KEPT", "MAX_KEPT_BYTES", "KeptGrammars", "reckoned_bytes"]

MAX_KEPT = 128
MAX_KEPT_BYTES = 128 * 2**20

_BYTES_EACH = 128 * 2**10
_BYTES_PER_CHAR = 128

G = TypeVar("G")


def reckoned_bytes(num_chars: int) -> int:
    """About what a grammar takes that was compiled from so many characters."""
    return _BYTES_EACH + _BYTES_PER_CHAR * num_chars


class KeptGrammars(Generic[G]):
    """The last ones that were asked for, by the digest of their format. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[G, int]] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: str) -> G | None:
        """The one with this key, which is then the last to go; None: it is not kept."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return None
            self._kept.move_to_end(key)
            return kept[0]

    def keep(self, key: str, grammar: G, num_chars: int) -> None:
        """Keep one; those that nobody has asked for the longest go, and one too large is not kept.

        Args:
            key: of its format.
            grammar: compiled.
            num_chars: of its format.
        """
        size = reckoned_bytes(num_chars)
        if size > MAX_KEPT_BYTES:
            return
        with self._lock:
            self._num_bytes += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = grammar, size
            while len(self._kept) > MAX_KEPT or self._num_bytes > MAX_KEPT_BYTES:
                _, (_, freed) = self._kept.popitem(last=False)
                self._num_bytes -= freed
