"""The pages of the KV cache: who holds them, which are free, which would be evicted next.

A page holds ``block_size`` tokens of one slab (g consecutive layers). All depths draw from this one
pool, so nothing fragments between depths.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

__all__ = ["BlockPool"]


class BlockPool:
    """Reference counts and the LRU order of the free pages.

    Invariants (``check_invariants``): a page is free exactly when nobody references it; free and
    referenced pages together are the whole pool. A free page may still hold content that the
    prefix cache knows (``keep=True`` at release); it is told through ``on_evict`` when such a page
    is given away.
    """

    def __init__(
        self, num_pages: int, *, on_evict: Callable[[int], None] = lambda page: None
    ) -> None:
        assert num_pages > 0
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._num_references = [0] * num_pages
        # Page -> whether its content is kept. First out is first: empty pages, then kept ones,
        # least recently used first.
        self._free: OrderedDict[int, bool] = OrderedDict.fromkeys(range(num_pages), False)
        self._num_kept = 0

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` could give out now, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody references."""
        return self.num_pages - len(self._free)

    @property
    def num_kept(self) -> int:
        """Free pages whose content the prefix cache still knows."""
        return self._num_kept

    def num_references(self, page: int) -> int:
        """How many sequences hold the page."""
        return self._num_references[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages, each referenced once. The caller has asked ``num_free`` first."""
        assert num_pages <= self.num_free, f"{num_pages} pages asked, {self.num_free} free"
        pages = []
        for _ in range(num_pages):
            page, kept = self._free.popitem(last=False)
            if kept:
                self._num_kept -= 1
                self._on_evict(page)
            self._num_references[page] = 1
            pages.append(page)
        return pages

    def acquire(self, page: int) -> None:
        """Reference a page that holds wanted content, free or not."""
        if self._num_references[page] == 0:
            self._num_kept -= self._free.pop(page)
        self._num_references[page] += 1

    def release(self, pages: Iterable[int], *, keep: Callable[[int], bool]) -> None:
        """Drop one reference each, in the order in which they should be evicted.

        Pages for which ``keep`` is false hold nothing of value and go out first.
        """
        for page in pages:
            self._num_references[page] -= 1
            assert self._num_references[page] >= 0, f"page {page} released too often"
            if self._num_references[page] == 0:
                self._free[page] = keep(page)
                self._num_kept += self._free[page]
                if not self._free[page]:
                    self._free.move_to_end(page, last=False)

    def check_invariants(self) -> None:
        """Assert what the class promises."""
        assert self._num_kept == sum(self._free.values())
        for page, count in enumerate(self._num_references):
            assert count >= 0
            assert (count == 0) == (page in self._free), f"page {page}: {count} references"
