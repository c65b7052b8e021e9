"""top_k, top_p and min_p as transformers defines them, without sorting the vocabulary.

A floor per row leaves the few candidates that can survive; only these are sorted. Where top_p
leaves thousands, ``sampling.wide`` is tried first. All decisions are float64 sums rounded to
float32, which is what transformers' float32 sums come to on a CPU. Sums run in order, from left to
right, so that padding to the widest neighbour changes no bit of them.

Shapes: N rows, V vocabulary, C candidates of a row, padded to the widest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.sampling import wide
from sortserve.engine.sampling.vocab_ops import (
    at_least,
    block_maxima,
    draw_in_order,
    kth_largest,
    pick,
    row_sums,
    take_rows,
)

__all__ = ["SLACK", "draw_filtered", "has_filter"]

_NARROW = 256
"""So few candidates are sorted as they are."""
_WIDE = 4096
"""A row with more candidates is finished alone: padding the others to its width costs more."""
SLACK = 0.01
"""How far, in natural logs, the floor lies under the exact bound. Hides its rounding."""


def has_filter(params: SamplingParams) -> bool:
    """Whether some tokens can be ruled out by top_k, top_p or min_p."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def draw_filtered(
    scores_NV: Tensor,
    uniform_N: Tensor,
    params: Sequence[SamplingParams],
    largest_NK: Tensor | None = None,
) -> list[int]:
    """One token per row from those that survive its filters; every row must have one.

    Args:
        scores_NV: float32 logits after temperature.
        uniform_N: float64 in [0, 1).
        params: each row's filters.
        largest_NK: the scores' ``block_maxima``, where these are known.
    """
    largest_NK = block_maxima(scores_NV) if largest_NK is None else largest_NK
    by_mass = [n for n, p in enumerate(params) if p.top_k <= 0 and p.top_p < 1.0]
    whole_MV = take_rows(scores_NV, by_mass).softmax(-1)
    drawn = _draw_wide_ones(scores_NV, whole_MV, uniform_N, by_mass, params)
    rest = [n for n in range(len(params)) if n not in drawn]
    if rest:
        left = [m for m, n in enumerate(by_mass) if n not in drawn]
        tokens = _draw_from_candidates(
            _find_candidates(
                take_rows(scores_NV, rest),
                [params[n] for n in rest],
                take_rows(largest_NK, rest),
                take_rows(whole_MV, left),
            ),
            uniform_N[rest],
            [params[n] for n in rest],
        )
        drawn |= dict(zip(rest, tokens, strict=True))
    return [drawn[n] for n in range(len(params))]


def _draw_wide_ones(
    scores_NV: Tensor,
    whole_MV: Tensor,
    uniform_N: Tensor,
    by_mass: Sequence[int],
    params: Sequence[SamplingParams],
) -> dict[int, int]:
    """The tokens of the rows that are better not looked at candidate by candidate."""
    if not by_mass:
        return {}
    spare_M1 = _column([1.0 - params[n].top_p for n in by_mass], scores_NV)
    looks_wide = wide.is_wide(whole_MV, spare_M1).tolist()
    unsure = [m for m, n in enumerate(by_mass) if looks_wide[m] and params[n].min_p <= 0.0]
    if not unsure:
        return {}
    rows = [by_mass[m] for m in unsure]
    result = wide.draw_wide(
        scores_NV,
        torch.tensor(rows, device=scores_NV.device),
        take_rows(whole_MV, unsure).clone()
        if len(unsure) == len(whole_MV)
        else take_rows(whole_MV, unsure),
        spare_M1[unsure],
        uniform_N[rows],
    )
    outcomes = zip(rows, result.token_M.tolist(), result.done_M.tolist(), strict=True)
    return {n: token for n, token, done in outcomes if done}


def _draw_from_candidates(
    candidates: _Candidates, uniform_N: Tensor, params: Sequence[SamplingParams]
) -> list[int]:
    candidates = _tighten(candidates, params)
    counts = candidates.count_N.tolist()
    groups = [[n] for n, count in enumerate(counts) if count > _WIDE]
    groups.append([n for n, count in enumerate(counts) if count <= _WIDE])
    tokens = [0] * len(counts)
    for group in filter(None, groups):
        part = candidates.of(group)
        weights_NC = _surviving_weights(part, [params[n] for n in group])
        token_N = pick(part.ids_NC, draw_in_order(weights_NC, uniform_N[group]))
        for n, token in zip(group, token_N.tolist(), strict=True):
            tokens[n] = token
    return tokens


@dataclass(frozen=True)
class _Candidates:
    """The tokens of each row that may survive its filters, in vocabulary order.

    Rows with fewer than C are padded at the end: score -inf, mass 0.
    """

    ids_NC: Tensor
    scores_NC: Tensor
    mass_NC: Tensor
    """float64 probability among the tokens that top_p counts."""
    below_N: Tensor
    """What the tokens that top_p counts and that are no candidates weigh together."""
    count_N: Tensor

    def of(self, rows: Sequence[int]) -> _Candidates:
        """These rows alone, no wider than they need."""
        count_N = self.count_N[rows]
        width = int(count_N.amax())
        return _Candidates(
            ids_NC=self.ids_NC[rows, :width],
            scores_NC=self.scores_NC[rows, :width],
            mass_NC=self.mass_NC[rows, :width],
            below_N=self.below_N[rows],
            count_N=count_N,
        )


def _find_candidates(
    scores_NV: Tensor,
    params: Sequence[SamplingParams],
    largest_NK: Tensor,
    whole_MV: Tensor,
) -> _Candidates:
    """Every token that may survive.

    The floor under a row's candidates is, with top_k, the k-th largest score (ties with it stay).
    With top_p alone: tokens no likelier than x weigh at most V * x together, so a token survives
    only if x > (1 - top_p) / V. With min_p alone: min_p times the largest probability.

    Args:
        scores_NV: of each row.
        params: its filters.
        largest_NK: the scores' ``block_maxima``.
        whole_MV: the softmax of those with top_p and no top_k.
    """
    by_rank = [n for n, p in enumerate(params) if p.top_k > 0]
    by_mass = [n for n, p in enumerate(params) if p.top_k <= 0 and p.top_p < 1.0]
    largest_N1 = largest_NK.amax(-1, keepdim=True)
    floor_N1 = largest_N1 + _column([p.min_p for p in params], scores_NV).log() - SLACK
    if by_rank:
        ks = [params[n].top_k for n in by_rank]
        floor_N1[by_rank] = kth_largest(
            take_rows(scores_NV, by_rank), ks, take_rows(largest_NK, by_rank)
        )
    if by_mass:
        spare_M1 = _column([1.0 - params[n].top_p for n in by_mass], scores_NV)
        ratio_M1 = spare_M1 / (scores_NV.shape[1] * whole_MV.amax(-1, keepdim=True))
        floor_N1[by_mass] = largest_N1[by_mass] + ratio_M1.log() - SLACK
    floor_N1.clamp_(min=torch.finfo(scores_NV.dtype).min)  # -inf has no weight

    ids_NC, count_N = at_least(scores_NV, floor_N1, largest_NK)
    padded_NC = _padded(ids_NC, count_N)
    scores_NC = scores_NV.gather(1, ids_NC).masked_fill(padded_NC, -torch.inf)
    mass_NC = (scores_NC - largest_N1).double().exp()
    mass_NC /= _total(mass_NC)[:, None]
    below_N = torch.zeros_like(mass_NC[:, 0])
    if by_mass:
        mass_MC = whole_MV.gather(1, ids_NC[by_mass]).double().masked_fill(padded_NC[by_mass], 0.0)
        mass_NC[by_mass] = mass_MC
        below_N[by_mass] = row_sums(whole_MV) - _total(mass_MC)
    return _Candidates(ids_NC, scores_NC, mass_NC, below_N, count_N)


def _tighten(candidates: _Candidates, params: Sequence[SamplingParams]) -> _Candidates:
    """Fewer candidates by the bound of top_p, over those that are left instead of V tokens.

    A row's are looked at again while that at least halves them: a pass is cheaper than the sort it
    saves. What the neighbours do is nothing to it.
    """
    by_mass_N = torch.tensor([p.top_p < 1.0 for p in params], device=candidates.count_N.device)
    active_N = by_mass_N & (candidates.count_N > _NARROW)
    while bool(active_N.any()):
        num_before_N = candidates.count_N
        candidates = _tighten_once(candidates, params, active_N)
        count_N = candidates.count_N
        active_N = active_N & (count_N > _NARROW) & (2 * count_N <= num_before_N)
    return candidates


def _tighten_once(
    candidates: _Candidates, params: Sequence[SamplingParams], active_N: Tensor
) -> _Candidates:
    mass_NC = candidates.mass_NC
    spare_N1 = _column([1.0 - p.top_p for p in params], mass_NC) - candidates.below_N[:, None]
    floor_N1 = spare_N1.clamp(min=0.0) / candidates.count_N[:, None] * (1.0 - SLACK)
    floor_N1.masked_fill_(~active_N[:, None], 0.0)
    floor_N1.clamp_(min=torch.finfo(mass_NC.dtype).tiny)  # not the padding
    kept_NC, count_N = at_least(mass_NC, floor_N1)
    padded_NC = _padded(kept_NC, count_N)
    left_NC = mass_NC.gather(1, kept_NC).masked_fill(padded_NC, 0.0)
    return _Candidates(
        ids_NC=candidates.ids_NC.gather(1, kept_NC),
        scores_NC=candidates.scores_NC.gather(1, kept_NC).masked_fill(padded_NC, -torch.inf),
        mass_NC=left_NC,
        below_N=candidates.below_N + (_total(mass_NC) - _total(left_NC)),
        count_N=count_N,
    )


def _surviving_weights(candidates: _Candidates, params: Sequence[SamplingParams]) -> Tensor:
    """The candidates' weights [N, C] in float64, 0 where top_p or min_p ruled one out."""
    weights_NC = candidates.mass_NC
    if any(p.top_p < 1.0 for p in params):
        weights_NC = weights_NC.masked_fill(_outside_top_p(candidates, params), 0.0)
    if any(p.min_p > 0.0 for p in params):
        probability_NC = (weights_NC / _total(weights_NC)[:, None]).float()
        least_N1 = _column([p.min_p for p in params], probability_NC)
        too_rare_NC = probability_NC < least_N1 * probability_NC.amax(-1, keepdim=True)
        weights_NC = weights_NC.masked_fill(too_rare_NC, 0.0)
    return weights_NC


def _outside_top_p(candidates: _Candidates, params: Sequence[SamplingParams]) -> Tensor:
    """Which candidates lie in the least likely 1 - top_p of the mass; never a row's likeliest.

    Of equal scores the higher id is ruled out first, so that the greedy token stays longest
    (transformers sorts unstably and leaves this open).
    """
    order_NC = candidates.scores_NC.sort(dim=-1, descending=True, stable=True).indices.flip(1)
    sorted_mass_NC = candidates.mass_NC.gather(1, order_NC)
    up_to_NC = (candidates.below_N[:, None] + sorted_mass_NC.cumsum(-1)).float()
    outside_NC = up_to_NC <= _column([1.0 - p.top_p for p in params], up_to_NC)
    outside_NC[:, -1] = False
    outside_NC &= _column([p.top_p for p in params], up_to_NC) < 1.0
    return torch.zeros_like(outside_NC).scatter_(1, order_NC, outside_NC)


def _total(x_NC: Tensor) -> Tensor:
    """Sum of each row [N], in order."""
    return x_NC.cumsum(-1)[:, -1]


def _padded(ids_NC: Tensor, count_N: Tensor) -> Tensor:
    return torch.arange(ids_NC.shape[1], device=ids_NC.device) >= count_N[:, None]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """The values as a column [N, 1] of the same type and on the same device."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
