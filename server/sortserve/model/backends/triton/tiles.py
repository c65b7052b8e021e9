"""How work is cut into programs: pure functions of sizes (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "INTERPRETED",
    "MAX_SPLITS",
    "SMALLEST_DOT",
    "Tiles",
    "next_power_of_two",
    "num_splits",
    "tiles_for",
]

SMALLEST_DOT = 16
"""``tl.dot`` takes no smaller side."""
MAX_SPLITS = 32
_TILE_BYTES = 16 * 1024
"""Of the keys of a tile: two such tiles in flight, and their values, fit the shared memory of any
device since Ampere (99 KiB)."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes that are compiled into the kernels, powers of two, and how they are run."""

    queries: int
    """Tokens of one program of ``prefill_kernel``."""
    keys: int
    """Keys that are attended at a time."""
    rows: int
    """Rows of one program of the row kernels."""
    heads: int
    """Heads of one program of ``rotate_and_write_kernel``."""
    programs: int
    """Programs that keep the device busy: rows of one token are split for as many."""
    num_stages: int = 2
    """Tiles of keys in flight."""


INTERPRETED = Tiles(queries=64, keys=32, rows=64, heads=256, programs=4)
"""Few programs with much work each, because the interpreter runs one after another; contexts of
more than a few dozen tokens still have several tiles, and several parts."""


def tiles_for(head_dim: int, itemsize: int, multiprocessors: int) -> Tiles:
    """Tiles for a device.

    Args:
        head_dim: H.
        itemsize: bytes of an element of the cache.
        multiprocessors: of the device.
    """
    row_bytes = next_power_of_two(head_dim) * itemsize
    keys = max(SMALLEST_DOT, min(64, _TILE_BYTES // row_bytes))
    return Tiles(
        queries=64 if itemsize == 2 else 32,
        keys=keys,
        rows=1,
        heads=8,
        programs=4 * multiprocessors,
    )


def num_splits(num_rows: int, num_kv_heads: int, programs: int) -> int:
    """Parts of a context that are attended side by side: a power of two, at most MAX_SPLITS.

    It is the same for all numbers of rows up to a power of two, so for those and the padded ones of
    a CUDA graph, and does not depend on the length of a context: a graph replays it for any.

    Args:
        num_rows: above 0.
        num_kv_heads: K.
        programs: how many are wanted; there are never more than that if there are several parts.
    """
    parts = programs // (next_power_of_two(num_rows) * num_kv_heads)
    return min(MAX_SPLITS, 1 << max(0, parts.bit_length() - 1))


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``, which is above 0."""
    return 1 << (n - 1).bit_length()
