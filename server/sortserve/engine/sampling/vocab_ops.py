"""What to do with rows as long as a vocabulary, where torch's general way is too slow.

Shapes: N rows, V vocabulary, B one block of it, K blocks (V = K * B), C candidates of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["argmax", "at_least", "draw", "draw_in_order", "pick", "row_sums", "take_rows"]

_BLOCK_SIZE = 64


def argmax(x_NV: Tensor) -> tuple[list[int], list[float]]:
    """First index of each row's largest value, and that value (NaN if the row has one).

    By blocks: torch's argmax along a long row is several times slower than its amax. One copy
    to the host.
    """
    if not len(x_NV):
        return [], []
    blocks_NKB = _blocks(x_NV)
    largest_NK = blocks_NKB.amax(-1)
    block_N = largest_NK.argmax(-1)
    token_N = block_N * blocks_NKB.shape[-1] + pick(blocks_NKB, block_N).argmax(-1)
    token_ids, values = torch.stack([token_N.double(), largest_NK.amax(-1).double()]).tolist()
    return [int(token_id) for token_id in token_ids], values


def pick(x_NC: Tensor, index_N: Tensor) -> Tensor:
    """``x_NC[n, index_N[n]]`` for each row n; further dimensions stay."""
    return x_NC[torch.arange(len(index_N), device=index_N.device), index_N]


def take_rows(x_NV: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows, ascending and each once; ``x_NV`` itself, not a copy, where they are all."""
    return x_NV if len(rows) == len(x_NV) else x_NV[rows]


def at_least(x_NV: Tensor, floor_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Which values of each row are at or above its floor: ids [N, C] ascending, and their number.

    Rows with fewer than C are padded with id 0. A block whose largest value is below the floor is
    not looked into.
    """
    blocks_NKB = _blocks(x_NV)
    row, block = (blocks_NKB.amax(-1) >= floor_N1).nonzero(as_tuple=True)
    hit, offset = (blocks_NKB[row, block] >= floor_N1[row]).nonzero(as_tuple=True)
    row, token = row[hit], block[hit] * blocks_NKB.shape[-1] + offset
    count_N = torch.bincount(row, minlength=len(x_NV))
    first_N = count_N.cumsum(0) - count_N
    rank = torch.arange(len(row), device=row.device) - first_N[row]
    ids_NC = row.new_zeros(len(x_NV), int(count_N.amax()))
    ids_NC[row, rank] = token
    return ids_NC, count_N


def row_sums(x_NV: Tensor) -> Tensor:
    """Sum of each row in float64, but for blocks of 64, which add up in the type they have."""
    return _blocks(x_NV).sum(-1).sum(-1, dtype=torch.float64)


def draw(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row, in index order, at a float64 in [0, 1).

    The weights need not sum to one. First the block is found, then the index in it; blocks add up
    in float64. An index of weight zero is never drawn.
    """
    blocks_NKB = _blocks(weights_NV)
    cumulative_NK = blocks_NKB.sum(-1).cumsum(-1, dtype=torch.float64)
    block_N, rest_N = _invert(cumulative_NK, uniform_N * cumulative_NK[:, -1])
    cumulative_NB = pick(blocks_NKB, block_N).cumsum(-1, dtype=torch.float64)
    return block_N * blocks_NKB.shape[-1] + _invert(cumulative_NB, rest_N)[0]


def draw_in_order(weights_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """The same for few float64 weights, added up one by one: zeros between them change nothing."""
    cumulative_NC = weights_NC.cumsum(-1)
    return _invert(cumulative_NC, uniform_N * cumulative_NC[:, -1])[0]


def _invert(cumulative_NC: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative weight is above the target, and the target counted from there.

    The target is held below the total, so that rounding at its upper end cannot run off the row.
    The weight at the index is above zero: the sum before it is not above the target, its own is.
    """
    total_N = cumulative_NC[:, -1]
    target_N = torch.minimum(target_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    index_N = torch.searchsorted(cumulative_NC, target_N[:, None], right=True)[:, 0]
    before_N = torch.where(index_N > 0, pick(cumulative_NC, (index_N - 1).clamp(min=0)), 0.0)
    return index_N, target_N - before_N


def _blocks(x_NV: Tensor) -> Tensor:
    """View [N, K, B]; B is the largest power of two up to the block size that divides V."""
    block_size = math.gcd(x_NV.shape[1], _BLOCK_SIZE)
    return x_NV.reshape(len(x_NV), x_NV.shape[1] // block_size, block_size)
