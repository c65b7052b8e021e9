"""Which pages hold the KV of which tokens: reuse of prefixes, deep to shallow.

KV of a layer depends on the tokens before it and on the layers below, never on the exit. So a block
computed by a deep request serves every shallower one. An entry is a block's pages from
slab 0 up to the deepest slab held: closed downwards, so eviction takes the deepest first and what
remains still serves shallow requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

__all__ = ["BlockDigests", "PrefixCache", "block_digest", "root_digest"]


def root_digest(salt: str) -> bytes:
    """The parent of the first block: prefixes are shared between requests of equal salt only."""
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"sortserve-salt").digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block: its tokens and all before them (``parent``)."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(np.asarray(token_ids, dtype=np.int64).tobytes())
    return digest.digest()


class BlockDigests:
    """The names of a text's full blocks, each hashed when it is first asked for and never again.

    Args:
        tokens: of the text, from one position to another.
        block_size: tokens of a block.
        salt: of the text.
        known: the names of its leading blocks, in their order; new ones are added.
    """

    def __init__(
        self,
        tokens: Callable[[int, int], Sequence[int]],
        *,
        block_size: int,
        salt: str,
        known: list[bytes],
    ) -> None:
        self._tokens, self._block_size, self._salt = tokens, block_size, salt
        self._known = known

    def of_block(self, block: int) -> bytes:
        """The name of one block; all before it have been asked for."""
        known = self._known
        assert block <= len(known)
        if block == len(known):
            parent = known[-1] if known else root_digest(self._salt)
            start = block * self._block_size
            known.append(block_digest(parent, self._tokens(start, start + self._block_size)))
        return known[block]

    def before_last(self, num_tokens: int) -> Iterator[bytes]:
        """The names of the blocks before the last of so many tokens: it must run in any case."""
        return map(self.of_block, range((num_tokens - 1) // self._block_size))


class PrefixCache:
    """Digest of a block -> its pages, slab 0 first. Holds no references; the pool's order rules."""

    def __init__(self) -> None:
        self._entries: dict[bytes, list[int]] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_pages(self) -> int:
        """Pages with known content, referenced or not."""
        return len(self._digest_of)

    def pages(self, digest: bytes) -> Sequence[int]:
        """The pages held for a block, slab 0 first; empty if unknown."""
        return self._entries.get(digest, ())

    def holds(self, page: int) -> bool:
        """Whether the page's content is known."""
        return page in self._digest_of

    def add(self, digest: bytes, page: int) -> None:
        """Learn the page of the next deeper slab of a block."""
        assert page not in self._digest_of
        self._entries.setdefault(digest, []).append(page)
        self._digest_of[page] = digest

    def forget(self, page: int) -> None:
        """The page was given away. It is the deepest of its block (see the pool's order)."""
        digest = self._digest_of.pop(page, None)
        if digest is None:
            return
        entry = self._entries[digest]
        assert entry[-1] == page, "a shallower slab was evicted before a deeper one"
        entry.pop()
        if not entry:
            del self._entries[digest]

    def drop(self, digest: bytes) -> None:
        """Forget a block at every depth: what its pages hold is not to be used again."""
        for page in self._entries.pop(digest, ()):
            del self._digest_of[page]

    def check_invariants(self) -> None:
        """Assert that the two maps are each other's inverse."""
        listed = [page for entry in self._entries.values() for page in entry]
        assert len(listed) == len(set(listed)) == len(self._digest_of)
        for digest, entry in self._entries.items():
            assert entry
            assert all(self._digest_of[page] == digest for page in entry)
