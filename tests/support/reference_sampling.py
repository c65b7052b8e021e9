"""The next token of one row, computed the plain way: transformers' processors and one uniform.

Slow and independent of ``sortserve.engine``, but for the noise ``uniform(seed, position)``, which
is written out again here: these lines are all it takes to reproduce a seeded sample offline.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sortserve.core.sampling_params import SamplingRow

__all__ = ["processed_logits", "reference_uniform", "sample_reference"]


def reference_uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from two rounds of the SplitMix64 finaliser."""

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    return (mix((mix(seed % 2**64) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53


def processed_logits(logits_V: Tensor, row: SamplingRow) -> Tensor:
    """The logits that the token is chosen from: -inf where it may not be."""
    params = row.params
    seen = torch.tensor([[*row.prompt_token_ids, *row.output_token_ids]])
    scores_1V = logits_V[None].clone()
    if params.repetition_penalty != 1.0:
        scores_1V = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))(
            seen, scores_1V
        )
    for token_id, count in Counter(row.output_token_ids).items():
        penalty = params.presence_penalty + params.frequency_penalty * count
        scores_1V[0, token_id] -= penalty
    for token_id, bias in params.logit_bias.items():
        scores_1V[0, token_id] += bias
    if len(row.output_token_ids) < params.min_tokens:
        scores_1V[0, sorted(row.stop_token_ids)] = -torch.inf
    if params.greedy:
        return scores_1V[0]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p))
    result: Tensor = warpers(seen, scores_1V)[0]
    return result


def sample_reference(logits_V: Tensor, row: SamplingRow) -> int:
    """The token of one row: argmax, or the inverse CDF at the row's noise."""
    scores_V = processed_logits(logits_V, row)
    if row.params.greedy:
        return int(scores_V.argmax())
    cumulative_V = scores_V.softmax(-1).cumsum(-1, dtype=torch.float64)
    noise = reference_uniform(row.seed, len(row.output_token_ids))
    above = (cumulative_V > noise * cumulative_V[-1]).nonzero()
    return int(above[0, 0])
