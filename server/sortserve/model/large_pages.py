"""Memory of a CPU in large pages, where the system has some to give.

What a step reads is far more than the processor keeps translations for. On pages of 4 KiB it looks
up where each 4 KiB lie, in a virtual machine twice: a decode step takes 1.15 times as long so.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["LARGE_PAGE", "large_pages"]

LARGE_PAGE = 2 << 20
"""Bytes."""


def large_pages(num_bytes: int) -> Tensor:
    """Zeroed memory, uint8 [num_bytes], which the system gives as it is first touched.

    It begins with a large page. A system without them gives it in pages as it has them.
    """
    size = num_bytes + LARGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Private, for what processes share has a setting of its own, and it is mostly off.
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, size)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % LARGE_PAGE :][:num_bytes]
