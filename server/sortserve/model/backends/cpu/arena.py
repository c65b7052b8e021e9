"""Memory for packed weights, in large pages: most matrices are smaller than one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sortserve.model.large_pages import LARGE_PAGE, large_pages

__all__ = ["Arena"]

_PIECE = 64 << 20
"""Bytes asked of the system at a time. What is not touched of them takes no memory."""
_ALIGNMENT = 64
"""A line of the cache: no load of a kernel crosses two."""


class Arena:
    """Hands out tensors that lie one after another in large pages.

    A piece of memory is given back when the last tensor in it is gone. Not for tensors that come
    and go: the room of one that is gone is not used again.
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with anything in it (zeros, as it happens)."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(*shape, dtype=dtype)
        if self._used + num_bytes > len(self._piece):
            self._piece, self._used = large_pages(max(num_bytes, _PIECE)), 0
        part = self._piece[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.check_invariants()
        return part.view(dtype).view(*shape)

    def check_invariants(self) -> None:
        """The next tensor begins with a line of the cache, in this piece or in a new one."""
        assert self._used % _ALIGNMENT == 0
        assert self._piece.data_ptr() % LARGE_PAGE == 0 or len(self._piece) == 0
