"""A sequence's share of a step, as the runner is told of it (no torch)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sortserve.core.plan import RowPlan
from sortserve.core.sequence import Sequence

__all__ = ["row_of"]

UNKNOWN = 0
"""Stands in a plan for a token that is not known yet."""


def row_of(sequence: Sequence, num_tokens: int, block_table_SB: NDArray[np.int32]) -> RowPlan:
    """The next tokens of a sequence; it samples after its last one.

    Args:
        sequence: running. Its latest token may be of the step under way: it is taken from there.
        num_tokens: how many to run, at least one and not more than are pending.
        block_table_SB: its pages.
    """
    start = sequence.num_computed_tokens
    token_ids = sequence.tokens(start, start + num_tokens)
    is_known = len(token_ids) == num_tokens
    samples = num_tokens == sequence.num_pending_tokens
    return RowPlan(
        request_id=sequence.request_id,
        exit_layer=sequence.exit_layer,
        start=start,
        token_ids=token_ids if is_known else [*token_ids, UNKNOWN],
        block_table_SB=block_table_SB,
        sampling=sequence.sampling_row() if samples else None,
        prompt_len=sequence.num_prompt_tokens,
        prompt_logprobs=sequence.prompt_logprobs,
        token_from=None if is_known else sequence.sampled_at,
        num_output_tokens=sequence.num_output_tokens,
    )
