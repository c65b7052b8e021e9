"""What loading frees goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from sortserve.engine.memory import return_freed_memory

PIECE_BYTES, NUM_PIECES = 64 << 10, 1000


def resident_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no line Rss")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
def test_what_was_freed_in_small_pieces_goes_back_to_the_system() -> None:
    pieces = [bytearray(PIECE_BYTES) for _ in range(NUM_PIECES)]
    above = bytearray(PIECE_BYTES)  # keeps the heap from shrinking by itself
    pieces.clear()
    before = resident_bytes()

    return_freed_memory()

    assert before - resident_bytes() > PIECE_BYTES * NUM_PIECES // 2
    assert len(above) == PIECE_BYTES
