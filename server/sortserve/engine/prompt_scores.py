"""The log probabilities of prompts: which tokens to look at, and what the head says of them.

Shape legend: B tokens of a block, N tokens of one exit, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import SampledToken
from sortserve.engine.sampling.logprobs import Report, log_sums
from sortserve.engine.sampling.vocab_ops import block_maxima
from sortserve.model.scored import AskedTokens, ScoredTokens

__all__ = ["record_prompts", "scored_tokens"]

BLOCK_TOKENS = 32
"""Tokens that pass the head together: a long prompt's logits are never in memory at once."""


def scored_tokens(plan: StepPlan, device: torch.device | str) -> ScoredTokens | None:
    """The tokens of a plan after which the next one of the prompt is to be judged; None: none."""
    if all(row.prompt_logprobs is None for row in plan.rows):
        return None
    found: dict[int, list[tuple[int, int]]] = {}
    begin = 0
    for row in plan.rows:
        for n in range(len(_targets(row))):
            found.setdefault(row.exit_layer, []).append((begin + n, row.start + n + 1))
        begin += row.num_tokens
    if not found:
        return None

    def asked(tokens: list[tuple[int, int]]) -> AskedTokens:
        places, context_lens = zip(*tokens, strict=True)
        return AskedTokens(torch.tensor(places, device=device), context_lens)

    return ScoredTokens({exit_layer: asked(tokens) for exit_layer, tokens in found.items()})


def record_prompts(
    plan: StepPlan, scored: ScoredTokens, logits: Callable[[Tensor, Sequence[int]], Tensor]
) -> None:
    """Record what the model says of the prompts that a plan has read.

    Args:
        plan: what ran.
        scored: as of ``scored_tokens``, filled by the decoder.
        logits: the head, [B, D] to fp32 [B, V], given the exits of the tokens.

    Raises:
        FloatingPointError: a log probability is not a number.
    """
    first = dict.fromkeys(scored.hidden_by_exit, 0)
    for row in plan.rows:
        if num_targets := len(_targets(row)):
            begin = first[row.exit_layer]
            first[row.exit_layer] += num_targets
            hidden_ND = scored.hidden_by_exit[row.exit_layer][begin : begin + num_targets]
            _record(row, hidden_ND, logits)


def _targets(row: RowPlan) -> list[int]:
    if row.prompt_logprobs is None:
        return []
    return list(row.prompt_logprobs.targets(row.start, row.num_tokens))


def _record(
    row: RowPlan, hidden_ND: Tensor, logits: Callable[[Tensor, Sequence[int]], Tensor]
) -> None:
    wanted, targets = row.prompt_logprobs, _targets(row)
    assert wanted is not None
    for begin, hidden_BD in _blocks(hidden_ND):
        token_ids = targets[begin : begin + len(hidden_BD)]
        logits_BV = logits(hidden_BD, [row.exit_layer] * len(hidden_BD))
        tokens = _describe(logits_BV, token_ids, wanted.num_top)
        if any(token.logprob is None or math.isnan(token.logprob) for token in tokens):
            raise FloatingPointError("a log probability of the prompt is not a number")
        wanted.record(row.start + begin, tokens)


def _blocks(hidden_ND: Tensor) -> Iterator[tuple[int, Tensor]]:
    for begin in range(0, len(hidden_ND), BLOCK_TOKENS):
        yield begin, hidden_ND[begin : begin + BLOCK_TOKENS]


def _describe(logits_BV: Tensor, token_ids: list[int], num_top: int) -> list[SampledToken]:
    logits_BV = logits_BV.contiguous()
    rows = range(len(token_ids))
    maxima_BK = block_maxima(logits_BV)
    report = Report(logits_BV, maxima_BK, rows, [num_top] * len(rows), log_sums(logits_BV))
    return report.describe(logits_BV, token_ids)
