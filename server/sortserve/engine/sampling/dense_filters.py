"""top_k, top_p and min_p as transformers defines them, over whole rows: what the search must equal.

Each row is ordered once. All decisions are float64 sums rounded to float32, which is what
transformers' float32 sums come to on a CPU.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.sampling.filters import SLACK
from sortserve.engine.sampling.vocab_ops import row_sums

__all__ = ["RowFilters", "surviving_weights"]


@dataclass(frozen=True)
class RowFilters:
    """The filters of each row as columns [N, 1], on the device of its scores."""

    top_k_N1: Tensor
    """int64; 0: none."""
    spare_N1: Tensor
    """float32 1 - top_p."""
    top_p_N1: Tensor
    """float32"""
    by_mass_N1: Tensor
    """bool: top_p counts all tokens, as there is no top_k."""
    min_p_N1: Tensor
    """float32"""

    @staticmethod
    def arrays(params: Sequence[SamplingParams]) -> list[NDArray[Any]]:
        """The fields, in order, on the host."""
        columns = (
            ([max(p.top_k, 0) for p in params], np.int64),
            ([1.0 - p.top_p for p in params], np.float32),
            ([p.top_p for p in params], np.float32),
            ([p.top_k <= 0 and p.top_p < 1.0 for p in params], np.bool_),
            ([p.min_p for p in params], np.float32),
        )
        return [np.array(values, dtype=dtype)[:, None] for values, dtype in columns]


def surviving_weights(scores_NV: Tensor, filters: RowFilters) -> Tensor:
    """What each token weighs [N, V], float64: 0 where a filter rules it out; never all of a row.

    Args:
        scores_NV: float32 logits after temperature.
        filters: of each row.
    """
    ordered = scores_NV.sort(dim=-1, descending=True, stable=True)  # of equals the lower id first
    whole_NV = scores_NV.softmax(-1)
    weights_NV = torch.where(
        filters.by_mass_N1,
        whole_NV.gather(1, ordered.indices).double(),
        _weights_above_floor(ordered.values, filters),
    )
    # From here on the least likely token comes first.
    weights_NV, order_NV = weights_NV.flip(1), ordered.indices.flip(1)
    total_N1 = torch.where(
        filters.by_mass_N1, row_sums(whole_NV)[:, None], weights_NV.sum(-1, keepdim=True)
    )
    weights_NV.masked_fill_(_outside_top_p(weights_NV, total_N1, filters), 0.0)
    probability_NV = (weights_NV / weights_NV.sum(-1, keepdim=True)).float()
    least_N1 = filters.min_p_N1 * probability_NV.amax(-1, keepdim=True)
    weights_NV.masked_fill_(probability_NV < least_N1, 0.0)
    return torch.zeros_like(weights_NV).scatter_(1, order_NV, weights_NV)


def _weights_above_floor(ordered_NV: Tensor, filters: RowFilters) -> Tensor:
    """Probabilities among the tokens above the floor of top_k (ties with it stay), or of min_p."""
    largest_N1 = ordered_NV[:, :1]
    kth_N1 = ordered_NV.gather(1, (filters.top_k_N1 - 1).clamp(0, ordered_NV.shape[1] - 1))
    rare_N1 = largest_N1 + filters.min_p_N1.log() - SLACK
    floor_N1 = torch.where(filters.top_k_N1 > 0, kth_N1, rare_N1)
    floor_N1.clamp_(min=torch.finfo(ordered_NV.dtype).min)  # -inf has no weight
    weights_NV = (ordered_NV - largest_N1).double().exp_()
    weights_NV.masked_fill_(ordered_NV < floor_N1, 0.0)
    return weights_NV.div_(weights_NV.sum(-1, keepdim=True))


def _outside_top_p(ascending_NV: Tensor, total_N1: Tensor, filters: RowFilters) -> Tensor:
    """Which tokens lie in the least likely 1 - top_p of the mass; never a row's likeliest.

    Of equal scores the higher id is ruled out first, so that the greedy token stays longest
    (transformers sorts unstably and leaves this open).
    """
    up_to_NV = ascending_NV.cumsum(-1)
    up_to_NV += total_N1 - ascending_NV.sum(-1, keepdim=True)
    outside_NV = (up_to_NV.float() <= filters.spare_N1) & (filters.top_p_N1 < 1.0)
    outside_NV[:, -1] = False
    return outside_NV
