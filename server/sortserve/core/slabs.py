"""Slabs: where the keys and values of each layer stand in the pages of a sequence (no torch).

A page holds ``block_size`` tokens of one slab: of a few layers that always come together. A
sequence at exit E has, for each block of its tokens, one page of each slab up to E.

Without layers of their own at exits (exit modules of kind ``layer``) a slab is g consecutive
layers, g the greatest common divisor of all exits, and every plane of every page is used.

An exit's own layer reads the trunk's state at the exit, as the next layer of the trunk does, so its
keys and values are one more layer's, of every token that passes the exit. They must not be where
only deeper rows have a page, nor where shallower ones have one: the block of a shallow donor would
hold less than a deeper row needs, though the page is there. So each segment, the layers from
one exit to the next and the own layer of the exit at its end, has slabs of its own: as many as hold
its layers. What that costs is padding in the last slab of a segment, at most a sixteenth of a
sequence's memory, because the size of the slabs is chosen for it. The other ways cost more: a plane
for an own layer in every page is 1 / g more memory for everybody, and a page of its own for each of
these layers leaves all its other planes empty.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Slabs"]

MAX_PADDING = 1 / 16
"""Largest share of a sequence's planes, at any exit, that slabs may waste to be fewer."""


@dataclass(frozen=True)
class Slabs:
    """How the layers of a model are divided among slabs."""

    size: int
    """Layers that a page has room for."""
    exits: tuple[int, ...] = ()
    """Where segments end, ascending. Empty: all slabs are full, one after another."""
    firsts: tuple[int, ...] = ()
    """The first slab of each segment, and the number of all."""

    @staticmethod
    def of(exits: Sequence[int], own_layers: Collection[int] = ()) -> Slabs:
        """The slabs of a model.

        Args:
            exits: that are served, ascending.
            own_layers: those of them that have a layer of their own.
        """
        assert set(own_layers) <= set(exits)
        if not own_layers:
            return Slabs(math.gcd(*exits))
        counts = [
            end - start + (end in own_layers) for start, end in itertools.pairwise((0, *exits))
        ]
        size = _largest_size(counts)
        firsts = itertools.accumulate((-(-count // size) for count in counts), initial=0)
        return Slabs(size, tuple(exits), tuple(firsts))

    def count(self, exit_layer: int) -> int:
        """Slabs up to an exit: pages of one block of tokens."""
        if not self.exits:
            return exit_layer // self.size
        return self.firsts[bisect_left(self.exits, exit_layer) + 1]

    def place(self, layer: int) -> tuple[int, int]:
        """Slab of a layer of the trunk, and its place in there."""
        if not self.exits:
            return divmod(layer, self.size)
        return self._place(layer, bisect_left(self.exits, layer + 1))

    def own_place(self, exit_layer: int) -> tuple[int, int]:
        """Those of the own layer of an exit."""
        return self._place(exit_layer, self.exits.index(exit_layer))

    def _place(self, layer: int, segment: int) -> tuple[int, int]:
        start = self.exits[segment - 1] if segment else 0
        slab, plane = divmod(layer - start, self.size)
        return self.firsts[segment] + slab, plane


def _largest_size(counts: Sequence[int]) -> int:
    """The largest size of slabs whose padding is tolerable, if segments have so many layers."""
    used = list(itertools.accumulate(counts))

    def is_tolerable(size: int) -> bool:
        held = itertools.accumulate(-(-count // size) * size for count in counts)
        return all(h - u <= MAX_PADDING * h for h, u in zip(held, used, strict=True))

    return max(size for size in range(1, max(counts) + 1) if is_tolerable(size))
