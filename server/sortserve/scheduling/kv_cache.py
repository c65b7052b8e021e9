"""The pages of every live sequence: grow, publish, share, go shallower, free."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, takewhile

import numpy as np
from numpy.typing import NDArray

from sortserve.core.request import Request
from sortserve.core.sequence import Sequence
from sortserve.core.slabs import Slabs
from sortserve.scheduling.block_pool import BlockPool
from sortserve.scheduling.prefix_cache import BlockDigests, PrefixCache
from sortserve.scheduling.prefix_heads import PrefixHeads

__all__ = ["KVCacheManager"]


class _PageTable:
    """One sequence's pages [slab, block], and how many leading blocks others can find."""

    def __init__(self, num_slabs: int, digests: BlockDigests) -> None:
        self.num_slabs = num_slabs
        self.num_blocks = 0
        self.digests = digests
        self.num_published = 0
        self._pages = np.full((num_slabs, 8), -1, dtype=np.int32)

    @property
    def view(self) -> NDArray[np.int32]:
        return self._pages[: self.num_slabs, : self.num_blocks]

    def append_block(self, pages: list[int]) -> None:
        if self.num_blocks == self._pages.shape[1]:
            self._pages = np.pad(
                self._pages, ((0, 0), (0, self.num_blocks)), constant_values=-1
            ).astype(np.int32, copy=False)
        self._pages[: self.num_slabs, self.num_blocks] = pages
        self.num_blocks += 1

    def pages_deepest_first(self, from_slab: int = 0) -> Iterator[int]:
        """Last block first, deepest slab first: the order in which pages should be evicted."""
        for block in range(self.num_blocks - 1, -1, -1):
            for slab in range(self.num_slabs - 1, from_slab - 1, -1):
                yield int(self._pages[slab, block])


class KVCacheManager:
    """Owns the pool, the prefix cache and every page table.

    A sequence holds one page of each slab up to its exit for each block of ``block_size`` tokens,
    so cache memory is proportional to depth (see ``Slabs``).
    """

    def __init__(
        self,
        *,
        num_pages: int,
        block_size: int,
        slabs: Slabs,
        enable_prefix_caching: bool = True,
        pages_are_resident: bool = False,
    ) -> None:
        self.block_size = block_size
        self.slabs = slabs
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix_cache = PrefixCache()
        self.prefix_heads = PrefixHeads()
        """What is in the cache, for those who send requests here."""
        self.pool = BlockPool(
            num_pages, on_evict=self.prefix_cache.forget, resident=pages_are_resident
        )
        self._tables: dict[str, _PageTable] = {}

    def num_pages_needed(self, num_tokens: int, exit_layer: int) -> int:
        """Pages for so many tokens at an exit."""
        return -(-num_tokens // self.block_size) * self.slabs.count(exit_layer)

    def block_table(self, sequence: Sequence) -> NDArray[np.int32]:
        """Page ids [slab, block] of a sequence, a view."""
        return self._tables[sequence.request_id].view

    # ---- a sequence arrives ----

    def match_prefix(self, sequence: Sequence) -> list[bytes]:
        """Digests of the leading blocks that are held at least as deep as the sequence needs.

        The last known token is never taken from the cache: it must run to give logits. Nor is any
        token of a prompt whose log probabilities are wanted.
        """
        if not self.enable_prefix_caching or sequence.prompt_logprobs is not None:
            return []
        num_slabs = self.slabs.count(sequence.exit_layer)
        digests = self._digests(sequence).before_last(sequence.num_tokens)
        return list(takewhile(lambda d: len(self.prefix_cache.pages(d)) >= num_slabs, digests))

    def held_tokens(self, request: Request, exits: Iterable[int]) -> dict[int, int]:
        """How many leading tokens of a prompt the cache holds for each exit, where it holds any.

        Any thread may ask, one at a time of a request: what it hears may be out of date.
        """
        if not self.enable_prefix_caching or request.prompt_logprobs is not None:
            return {}
        prompt = request.prompt_token_ids
        digests = BlockDigests(
            lambda start, stop: prompt[start:stop],
            block_size=self.block_size,
            salt=request.cache_salt,
            known=request.block_digests.setdefault(self.block_size, []),
        )
        held = (len(self.prefix_cache.pages(d)) for d in digests.before_last(len(prompt)))
        # A block is of use only as far as all before it are there.
        depths = list(takewhile(bool, accumulate(held, min)))
        num_blocks = {e: sum(depth >= self.slabs.count(e) for depth in depths) for e in exits}
        return {e: count * self.block_size for e, count in num_blocks.items() if count}

    def _digests(self, sequence: Sequence) -> BlockDigests:
        """Of a sequence, which goes on from those that were looked up for its request."""
        request, known = sequence.request, sequence.block_digests
        if not known:
            known += request.block_digests.get(self.block_size, ())
        return BlockDigests(
            sequence.tokens, block_size=self.block_size, salt=request.cache_salt, known=known
        )

    def can_admit(self, sequence: Sequence, *, num_spare_pages: int) -> bool:
        """Whether all known tokens fit now and ``num_spare_pages`` remain free."""
        num_slabs = self.slabs.count(sequence.exit_layer)
        matched = self.match_prefix(sequence)
        num_free = self.pool.num_free - sum(
            self.pool.num_references(page) == 0
            for digest in matched
            for page in self.prefix_cache.pages(digest)[:num_slabs]
        )
        needed = self.num_pages_needed(sequence.num_tokens, sequence.exit_layer)
        return needed - len(matched) * num_slabs + num_spare_pages <= num_free

    def admit(self, sequence: Sequence) -> int:
        """Give a sequence the pages of all its known tokens; returns how many need no compute."""
        num_slabs = self.slabs.count(sequence.exit_layer)
        table = _PageTable(num_slabs, self._digests(sequence))
        for digest in self.match_prefix(sequence):
            pages = list(self.prefix_cache.pages(digest)[:num_slabs])
            for page in pages:
                self.pool.acquire(page)
            table.append_block(pages)
            table.num_published += 1
            self.prefix_heads.note(digest, table.num_published)
        assert sequence.request_id not in self._tables
        self._tables[sequence.request_id] = table
        num_cached_tokens = table.num_blocks * self.block_size
        self.grow(sequence, sequence.num_tokens)
        return num_cached_tokens

    # ---- a sequence lives ----

    def num_pages_to_grow(self, sequence: Sequence, num_tokens: int) -> int:
        """Further pages a sequence needs to hold ``num_tokens``."""
        table = self._tables[sequence.request_id]
        num_blocks = -(-num_tokens // self.block_size)
        return max(0, num_blocks - table.num_blocks) * table.num_slabs

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Take the pages to hold ``num_tokens``; the caller has checked that they are free."""
        table = self._tables[sequence.request_id]
        while table.num_blocks * self.block_size < num_tokens:
            table.append_block(self.pool.allocate(table.num_slabs))

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the full blocks of the first ``num_tokens`` known: they have been computed.

        Where the cache already holds a block (two requests computed it side by side), the sequence
        moves over to the cached pages: one copy, and whoever holds a block's deep pages also holds
        its shallow ones, which keeps the eviction order closed downwards.
        """
        if not self.enable_prefix_caching:
            return
        table = self._tables[sequence.request_id]
        for block in range(table.num_published, num_tokens // self.block_size):
            digest = table.digests.of_block(block)
            self._publish_block(table, block, digest)
            table.num_published += 1
            self.prefix_heads.note(digest, table.num_published)

    def _publish_block(self, table: _PageTable, block: int, digest: bytes) -> None:
        known = list(self.prefix_cache.pages(digest))
        column = table.view[:, block]
        for slab in range(table.num_slabs):
            own = int(column[slab])
            if slab >= len(known):
                self.prefix_cache.add(digest, own)
            elif known[slab] != own:
                self.pool.acquire(known[slab])
                self.pool.release([own], keep=self.prefix_cache.holds)
                column[slab] = known[slab]

    def go_shallower(self, sequence: Sequence, exit_layer: int) -> None:
        """Free the pages above ``exit_layer``; all shallower KV exists already."""
        table = self._tables[sequence.request_id]
        num_slabs = self.slabs.count(exit_layer)
        assert 0 < num_slabs < table.num_slabs
        self.pool.release(
            list(table.pages_deepest_first(from_slab=num_slabs)), keep=self.prefix_cache.holds
        )
        table.num_slabs = num_slabs

    def distrust(self, sequence: Sequence) -> None:
        """Let nobody reuse the blocks of a sequence: their content may be what made it fail."""
        table = self._tables[sequence.request_id]
        for block in range(table.num_published):
            self.prefix_cache.drop(table.digests.of_block(block))

    def free(self, sequence: Sequence) -> None:
        """Drop all pages of a sequence."""
        table = self._tables.pop(sequence.request_id)
        self.pool.release(list(table.pages_deepest_first()), keep=self.prefix_cache.holds)

    @contextmanager
    def borrowed(self, num_pages: int) -> Iterator[list[int]]:
        """Free pages to write to for a moment; the caller has checked that there are so many."""
        pages = self.pool.allocate(num_pages)
        try:
            yield pages
        finally:
            self.pool.release(pages, keep=lambda page: False)

    def held_prefixes(self, exits: Collection[int], *, most: int) -> dict[str, int]:
        """Digests of prefixes that the cache holds, and the deepest exit it holds each of them for.

        Any thread may ask: what it hears may be out of date.

        Args:
            exits: ascending.
            most: prefixes to name, the latest used.
        """
        held: dict[str, int] = {}
        for digest in self.prefix_heads.latest():
            num_slabs = len(self.prefix_cache.pages(digest))
            deep = [e for e in exits if self.slabs.count(e) <= num_slabs]
            if deep:
                held[digest.hex()] = deep[-1]
            if len(held) == most:
                break
        return held

    # ---- checks ----

    def check_invariants(self) -> None:
        """Assert that references are exactly what the page tables hold."""
        self.pool.check_invariants()
        self.prefix_cache.check_invariants()
        counts: dict[int, int] = {}
        for table in self._tables.values():
            assert (table.view >= 0).all()
            for held in table.view.flat:
                counts[int(held)] = counts.get(int(held), 0) + 1
        for page in range(self.pool.num_pages):
            assert self.pool.num_references(page) == counts.get(page, 0), f"page {page}"
