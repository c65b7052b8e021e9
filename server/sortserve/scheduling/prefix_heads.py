"""Which prefixes were used lately, by a few names each: what a router asks for (no torch).

A prefix of b full blocks has the digest of its last block, which stands for all tokens up to there.
To name every block of every prompt would make reports long, so only some lengths are noted: 1, 2,
3, 4, 6, 8, 12, 16 ... blocks. The longest one noted is at least two thirds of what is shared.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import islice

from sortserve.scheduling.prefix_cache import BlockDigests

__all__ = ["MAX_HEADS", "PrefixHeads", "is_noted", "prefix_digests"]

MAX_HEADS = 1024
"""Most digests that are kept, the latest used."""
MAX_BLOCKS = 128
"""Longer prefixes have no name."""


def is_noted(num_blocks: int) -> bool:
    """Whether prefixes of so many blocks have a name: 2^k and 3 * 2^k do."""
    odd = num_blocks // (num_blocks & -num_blocks) if num_blocks else 0
    return odd in (1, 3) and num_blocks <= MAX_BLOCKS


def prefix_digests(
    token_ids: Sequence[int], *, block_size: int, salt: str = ""
) -> list[tuple[int, str]]:
    """The names of a prompt's prefixes: (tokens, digest), ascending."""
    digests = BlockDigests(
        lambda start, stop: token_ids[start:stop], block_size=block_size, salt=salt, known=[]
    )
    leading = enumerate(islice(digests.before_last(len(token_ids)), MAX_BLOCKS), start=1)
    return [(n * block_size, digest.hex()) for n, digest in leading if is_noted(n)]


class PrefixHeads:
    """Owns the names of prefixes, in the order of their use. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: dict[bytes, None] = {}

    def note(self, digest: bytes, num_blocks: int) -> None:
        """A prefix of so many blocks is used now."""
        if not is_noted(num_blocks):
            return
        with self._lock:
            self._digests.pop(digest, None)
            self._digests[digest] = None
            if len(self._digests) > MAX_HEADS:
                del self._digests[next(iter(self._digests))]

    def latest(self) -> list[bytes]:
        """All of them, the latest used first."""
        with self._lock:
            return list(reversed(self._digests))
