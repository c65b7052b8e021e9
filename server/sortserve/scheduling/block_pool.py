"""The pages of the KV cache: who holds them, which are free, which goes out next.

A page holds ``block_size`` tokens of one slab (g consecutive layers). All depths draw from this one
pool, so nothing fragments between depths.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

__all__ = ["BlockPool"]

MIN_CACHE_SHARE = 1 / 32
"""Share of the pool that kept pages may always grow to, however little load there ever was."""


class BlockPool:
    """Reference counts and the order in which free pages go out.

    A free page is in one of three states. It was never *touched*: on a CPU it takes no memory until
    it is. It is *empty*: used before, and of no value now. Or it is *kept*: the prefix cache still
    knows its content (``keep=True`` at release), and is told through ``on_evict`` when the page is
    given away.

    Empty pages go out first, the latest first. When there is none, the pool either grows by a page
    that was never touched, or evicts the kept page that was used least recently. It grows as long
    as fewer pages are kept than were ever referenced at once (or ``MIN_CACHE_SHARE`` of the pool):
    so memory follows the load, and the cache has as much room as the load itself. A pool whose
    pages are ``resident`` from the start has nothing to save, and evicts only when it must.

    Invariants (``check_invariants``): a page is free exactly when nobody references it; free and
    referenced pages together are the whole pool.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        on_evict: Callable[[int], None] = lambda page: None,
        resident: bool = False,
    ) -> None:
        assert num_pages > 0
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._resident = resident
        self._num_references = [0] * num_pages
        self._num_touched = 0  # the lowest ids
        self._empty: list[int] = []  # last in, first out
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._most_used = int(MIN_CACHE_SHARE * num_pages)

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` could give out now, cached ones included."""
        return self.num_pages - self.num_used

    @property
    def num_used(self) -> int:
        """Pages that somebody references."""
        return self._num_touched - len(self._empty) - len(self._kept)

    @property
    def num_kept(self) -> int:
        """Free pages whose content the prefix cache still knows."""
        return len(self._kept)

    @property
    def num_touched(self) -> int:
        """Pages that were ever given out: what takes memory."""
        return self._num_touched

    def num_references(self, page: int) -> int:
        """How many sequences hold the page."""
        return self._num_references[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages, each referenced once. The caller has asked ``num_free`` first."""
        assert num_pages <= self.num_free, f"{num_pages} pages asked, {self.num_free} free"
        pages = []
        for _ in range(num_pages):
            page = self._take()
            self._num_references[page] = 1
            pages.append(page)
        self._most_used = max(self._most_used, self.num_used)
        return pages

    def _take(self) -> int:
        if self._empty:
            return self._empty.pop()
        may_grow = self._num_touched < self.num_pages
        if may_grow and (self._resident or not self._kept or len(self._kept) < self._most_used):
            self._num_touched += 1
            return self._num_touched - 1
        page, _ = self._kept.popitem(last=False)
        self._on_evict(page)
        return page

    def acquire(self, page: int) -> None:
        """Reference a page that holds wanted content, free or not."""
        if self._num_references[page] == 0:
            del self._kept[page]
        self._num_references[page] += 1
        self._most_used = max(self._most_used, self.num_used)

    def release(self, pages: Iterable[int], *, keep: Callable[[int], bool]) -> None:
        """Drop one reference each, in the order in which they should be evicted.

        Pages for which ``keep`` is false hold nothing of value and go out first.
        """
        for page in pages:
            self._num_references[page] -= 1
            assert self._num_references[page] >= 0, f"page {page} released too often"
            if self._num_references[page] == 0:
                if keep(page):
                    self._kept[page] = None
                else:
                    self._empty.append(page)

    def check_invariants(self) -> None:
        """Assert what the class promises."""
        untouched = range(self._num_touched, self.num_pages)
        free = [*untouched, *self._empty, *self._kept]
        assert len(free) == len(set(free)) == self.num_free, "a page is free twice"
        is_free = set(free)
        for page, count in enumerate(self._num_references):
            assert count >= 0
            assert (count == 0) == (page in is_free), f"page {page}: {count} references"
