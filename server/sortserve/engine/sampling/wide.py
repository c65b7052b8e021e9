"""top_p where the model is unsure: thousands of tokens survive, and to sort them costs the most.

Only the tokens around the cut need an order. A sample of the row says where the cut must lie; exact
sums over the row say whether that is true. Then the few tokens between the two guesses are sorted,
and one of the survivors is drawn. Rows for which a guess was wrong are left to the general way,
which comes to the same: both add up the same float64 numbers, only in another order.

Shapes: M rows, V vocabulary, S the sample of a row, C tokens near the cut, padded to the widest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sortserve.engine.sampling.vocab_ops import BlockDraw, padded_lists, row_sums

__all__ = ["Wide", "draw_wide", "is_wide"]

_STRIDE = 24
"""One token of so many is in the sample."""
_MANY = 64
"""With so many candidates in its sample, a row is worth the passes over all of it."""
_LOW, _HIGH = 0.87, 1.15
"""The guesses: where the sample's tail weighs this much of what must be cut."""


@dataclass(frozen=True)
class Wide:
    """Tokens of rows for which it worked out."""

    token_M: Tensor
    done_M: Tensor
    """Whether the token stands; else the row is for the general way."""


def is_wide(whole_MV: Tensor, spare_M1: Tensor) -> Tensor:
    """Which rows have many tokens above the floor of top_p; a bool for each.

    Args:
        whole_MV: probabilities.
        spare_M1: 1 - top_p.
    """
    floor_M1 = spare_M1 / whole_MV.shape[1]
    return (whole_MV[:, ::_STRIDE] > floor_M1).sum(-1) > _MANY


def draw_wide(
    scores_NV: Tensor, row_M: Tensor, whole_MV: Tensor, spare_M1: Tensor, uniform_M: Tensor
) -> Wide:
    """Draw from the tokens that top_p leaves.

    Args:
        scores_NV: what the order is by.
        row_M: which of these rows to draw from.
        whole_MV: the softmax of those. Consumed.
        spare_M1: 1 - top_p, above 0.
        uniform_M: float64 in [0, 1).
    """
    low_M1, high_M1 = _guess(whole_MV, spare_M1)
    total_M = row_sums(whole_MV)
    kept_MV = whole_MV >= low_M1
    near, token = (kept_MV & (whole_MV < high_M1)).nonzero(as_tuple=True)
    ids_MC, count_M = padded_lists(near, token, len(whole_MV))
    padded_MC = torch.arange(ids_MC.shape[1], device=ids_MC.device) >= count_M[:, None]
    mass_MC = whole_MV.gather(1, ids_MC).double().masked_fill(padded_MC, 0.0)
    scores_MC = scores_NV[row_M[:, None], ids_MC].masked_fill(padded_MC, torch.inf)

    kept = BlockDraw(whole_MV.mul_(kept_MV))
    below_M1 = (total_M - kept.total_N)[:, None]
    order_MC = scores_MC.flip(1).sort(dim=-1, stable=True).indices  # of equals the higher id first
    order_MC = ids_MC.shape[1] - 1 - order_MC
    up_to_MC = (below_M1 + mass_MC.gather(1, order_MC).cumsum(-1)).float()
    outside_MC = (up_to_MC <= spare_M1) & ~padded_MC.gather(1, order_MC)
    done_M = (below_M1.float() <= spare_M1)[:, 0] & (up_to_MC[:, -1] > spare_M1[:, 0])
    row, column = outside_MC.nonzero(as_tuple=True)
    kept.remove(row, ids_MC.gather(1, order_MC)[row, column], low_M1)
    return Wide(token_M=kept.draw(uniform_M), done_M=done_M)


def _guess(whole_MV: Tensor, spare_M1: Tensor) -> tuple[Tensor, Tensor]:
    """Two probabilities between which the last token that is cut should lie."""
    sample_MS = whole_MV[:, ::_STRIDE].sort(dim=-1).values
    tail_MS = sample_MS.cumsum(-1) * (whole_MV.shape[1] / sample_MS.shape[1])
    last = sample_MS.shape[1] - 1
    low_M1 = sample_MS.gather(1, torch.searchsorted(tail_MS, _LOW * spare_M1).clamp(max=last))
    high_M1 = sample_MS.gather(1, torch.searchsorted(tail_MS, _HIGH * spare_M1).clamp(max=last))
    tiny = torch.finfo(low_M1.dtype).tiny
    return low_M1.clamp(min=tiny), high_M1
