"""What to do with rows as long as a vocabulary, where torch's general way is too slow.

Shapes: N rows, V vocabulary, B one block of it, K blocks (V = K * B), C candidates of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BlockDraw",
    "argmax",
    "at_least",
    "block_maxima",
    "draw",
    "draw_in_order",
    "kth_largest",
    "never_falling",
    "num_blocks",
    "padded_lists",
    "pick",
    "row_sums",
    "take_rows",
]

_BLOCK_SIZE = 64
_ROWS_AT_ONCE = 8


def argmax(x_NV: Tensor, largest_NK: Tensor | None = None) -> tuple[list[int], list[float]]:
    """First index of each row's largest value, and that value (NaN if the row has one).

    By blocks: torch's argmax along a long row is several times slower than its amax. One copy
    to the host.

    Args:
        x_NV: the rows.
        largest_NK: their ``block_maxima``, where these are known.
    """
    if not len(x_NV):
        return [], []
    largest_NK = block_maxima(x_NV) if largest_NK is None else largest_NK
    blocks_NKB = _blocks(x_NV)
    block_N = largest_NK.argmax(-1)
    token_N = block_N * blocks_NKB.shape[-1] + pick(blocks_NKB, block_N).argmax(-1)
    token_ids, values = torch.stack([token_N.double(), largest_NK.amax(-1).double()]).tolist()
    return [int(token_id) for token_id in token_ids], values


def block_maxima(x_NV: Tensor) -> Tensor:
    """The largest value of each block [N, K]: what a search looks at first."""
    return _blocks(x_NV).amax(-1)


def num_blocks(vocab_size: int) -> int:
    """K of a row of so many."""
    return vocab_size // math.gcd(vocab_size, _BLOCK_SIZE)


def pick(x_NC: Tensor, index_N: Tensor) -> Tensor:
    """``x_NC[n, index_N[n]]`` for each row n; further dimensions stay."""
    return x_NC[torch.arange(len(index_N), device=index_N.device), index_N]


def take_rows(x_NV: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows, ascending and each once; ``x_NV`` itself, not a copy, where they are all."""
    if len(rows) == len(x_NV):
        return x_NV
    return x_NV.index_select(0, torch.tensor(rows, dtype=torch.int64, device=x_NV.device))


def at_least(
    x_NV: Tensor, floor_N1: Tensor, largest_NK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which values of each row are at or above its floor: ids [N, C] ascending, and their number.

    Rows with fewer than C are padded with id 0. A block whose largest value is below the floor is
    not looked into.

    Args:
        x_NV: the rows.
        floor_N1: the floor of each.
        largest_NK: their ``block_maxima``, where these are known.
    """
    largest_NK = block_maxima(x_NV) if largest_NK is None else largest_NK
    blocks_NKB = _blocks(x_NV)
    row, block = (largest_NK >= floor_N1).nonzero(as_tuple=True)
    hit, offset = (blocks_NKB[row, block] >= floor_N1[row]).nonzero(as_tuple=True)
    row, token = row[hit], block[hit] * blocks_NKB.shape[-1] + offset
    return padded_lists(row, token, len(x_NV))


def padded_lists(row_P: Tensor, id_P: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The ids of each row side by side [N, C], padded with 0 at the end, and their number.

    Args:
        row_P: whose id it is, ascending.
        id_P: the ids.
        num_rows: N.
    """
    count_N = torch.bincount(row_P, minlength=num_rows)
    first_N = count_N.cumsum(0) - count_N
    rank_P = torch.arange(len(row_P), device=row_P.device) - first_N[row_P]
    ids_NC = row_P.new_zeros(num_rows, max(int(count_N.amax()), 1))
    ids_NC[row_P, rank_P] = id_P
    return ids_NC, count_N


def kth_largest(x_NV: Tensor, ks: Sequence[int], largest_NK: Tensor | None = None) -> Tensor:
    """The ``ks[n]``-th largest value of each row n [N, 1]; the smallest where a row is shorter.

    At least k values are at or above the k-th largest of the blocks' maxima. These are few, and
    only they are ordered: ordering a row of V costs as much as a hundred passes over it. Where
    there are fewer blocks than k, the whole rows are ordered.

    Args:
        x_NV: the rows, -inf allowed.
        ks: from 1, one for each row.
        largest_NK: their ``block_maxima``, where these are known.
    """
    largest_NK = block_maxima(x_NV) if largest_NK is None else largest_NK
    width = x_NV.shape[1]
    small = [n for n, k in enumerate(ks) if k <= largest_NK.shape[1]]
    large = [n for n, k in enumerate(ks) if k > largest_NK.shape[1]]
    kth_N1 = torch.empty_like(largest_NK[:, :1])
    if small:
        part_MV, part_MK = take_rows(x_NV, small), take_rows(largest_NK, small)
        index_M1 = torch.tensor([[ks[n] - 1] for n in small], device=x_NV.device)
        most = max(ks[n] for n in small)
        bound_M1 = part_MK.topk(most).values.gather(1, index_M1)
        ids_MC, count_M = at_least(part_MV, bound_M1, part_MK)
        padded_MC = torch.arange(ids_MC.shape[1], device=x_NV.device) >= count_M[:, None]
        values_MC = part_MV.gather(1, ids_MC).masked_fill(padded_MC, -torch.inf)
        ordered_MC = values_MC.topk(min(most, values_MC.shape[1])).values
        kth_N1[small] = ordered_MC.gather(1, index_M1)
    if large:
        index_M1 = torch.tensor([[min(ks[n], width) - 1] for n in large], device=x_NV.device)
        most = min(max(ks[n] for n in large), width)
        kth_N1[large] = take_rows(x_NV, large).topk(most).values.gather(1, index_M1)
    return kth_N1


def row_sums(x_NV: Tensor) -> Tensor:
    """Sum of each row in float64, but for blocks of 64, which add up in the type they have."""
    return _blocks(x_NV).sum(-1).sum(-1, dtype=torch.float64)


def draw(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row, in index order, at a float64 in [0, 1).

    The weights need not sum to one. First the block is found, then the index in it; blocks add up
    in float64. An index of weight zero is never drawn.
    """
    blocks_NKB = _blocks(weights_NV)
    cumulative_NK = _cumulative(blocks_NKB.sum(-1))
    block_N, rest_N = _invert(cumulative_NK, uniform_N * cumulative_NK[:, -1])
    cumulative_NB = _cumulative(pick(blocks_NKB, block_N))
    return block_N * blocks_NKB.shape[-1] + _invert(cumulative_NB, rest_N)[0]


class BlockDraw:
    """Draws from long rows of float32 weights, all sums in float64: block sums, then one block.

    Attributes:
        total_N: sum of each row, float64.
    """

    def __init__(self, weights_NV: Tensor) -> None:
        self._blocks_NKB = _blocks(weights_NV)
        parts = torch.split(self._blocks_NKB, _ROWS_AT_ONCE)  # each is copied as float64
        self._sums_NK = torch.cat([part.sum(-1, dtype=torch.float64) for part in parts])
        self.total_N = self._sums_NK.sum(-1)

    def remove(self, row_P: Tensor, token_P: Tensor, least_N1: Tensor) -> None:
        """Let these tokens weigh nothing; all that are left weigh ``least_N1`` or more."""
        block_size = self._blocks_NKB.shape[-1]
        at = (row_P, token_P // block_size, token_P % block_size)
        removed_P = self._blocks_NKB[at].double()
        self._sums_NK.index_put_(at[:2], -removed_P, accumulate=True)
        self._sums_NK.mul_(self._sums_NK > 0.5 * least_N1)  # what rounding left of empty blocks
        self._blocks_NKB[at] = 0.0

    def draw(self, uniform_N: Tensor) -> Tensor:
        """One index of each row; one of weight zero is never drawn."""
        cumulative_NK = _cumulative(self._sums_NK)
        block_N, rest_N = _invert(cumulative_NK, uniform_N * cumulative_NK[:, -1])
        cumulative_NB = _cumulative(pick(self._blocks_NKB, block_N))
        return block_N * self._blocks_NKB.shape[-1] + _invert(cumulative_NB, rest_N)[0]


def draw_in_order(weights_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """The same for few float64 weights, added up one by one: zeros between them change nothing."""
    cumulative_NC = _cumulative(weights_NC)
    return _invert(cumulative_NC, uniform_N * cumulative_NC[:, -1])[0]


def _cumulative(weights_NC: Tensor) -> Tensor:
    """The float64 sums up to each weight; they stand still at zeros, and fall nowhere."""
    cumulative_NC = weights_NC.cumsum(-1, dtype=torch.float64)
    if weights_NC.device.type == "cpu":  # added up one by one
        return cumulative_NC
    return never_falling(cumulative_NC, weights_NC)


def never_falling(cumulative_NC: Tensor, weights_NC: Tensor) -> Tensor:
    """The sums of a device that adds up in a tree, and rounds each one on its own way there."""
    return cumulative_NC.masked_fill(weights_NC == 0.0, 0.0).cummax(-1).values


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
    return x_NV.reshape(len(x_NV), (k := num_blocks(x_NV.shape[1])), x_NV.shape[1] // k)
