"""The largest step that an engine can be asked for, so that its memory can be measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sortserve.core.plan import RowPlan, Runner, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.core.slabs import Slabs

__all__ = ["largest_steps", "num_pages_of_largest_steps", "run_largest_steps"]

DECODE_CONTEXT = 1024
"""Tokens of the rows that decode. More take more memory where a backend gathers them; but so many
rows of so many tokens fill most caches."""


def num_pages_of_largest_steps(
    *, max_model_len: int, max_num_batched_tokens: int, block_size: int
) -> int:
    """Pages that ``largest_steps`` are written to."""
    longest = min(max_model_len, max(max_num_batched_tokens, DECODE_CONTEXT))
    return -(-longest // block_size)


def run_largest_steps(
    runner: Runner,
    *,
    depth: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    last_exit: int | None = None,
) -> None:
    """Run them; what they write and sample means nothing."""
    for plan in largest_steps(
        depth=depth,
        slabs=runner.slabs,
        block_size=runner.block_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        last_exit=last_exit,
    ):
        runner.execute(plan)


def largest_steps(
    *,
    depth: int,
    slabs: Slabs,
    block_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    last_exit: int | None = None,
) -> list[StepPlan]:
    """One of prompts alone and one in which all rows decode; all rows sample, at full depth.

    If there is a ``last_exit``, a step's last row of several leaves there: through a head of its
    own, whose logits are joined with those of the others.

    All rows and slabs share the same few pages: it is the step's memory that counts, and no cache
    has room for all of them yet.
    """
    num_slabs = slabs.count(depth)
    sampling = SamplingRow(
        SamplingParams(temperature=1.0, top_p=0.9), 0, (0,), (), stop_token_ids=frozenset()
    )

    def row(index: int, start: int, num_tokens: int) -> RowPlan:
        pages = np.arange(-(-(start + num_tokens) // block_size), dtype=np.int32)
        return RowPlan(
            request_id=f"largest-step-{index}",
            exit_layer=depth,
            start=start,
            token_ids=(0,) * num_tokens,
            block_table_SB=np.tile(pages, (num_slabs, 1)),
            sampling=sampling,
        )

    full, rest = divmod(max_num_batched_tokens, max_model_len)
    lengths = [max_model_len] * full + [rest] * (rest > 0)
    prompts = [row(i, 0, length) for i, length in enumerate(lengths[:max_num_seqs])]
    context = min(max_model_len, DECODE_CONTEXT)
    decoding = [row(i, context - 1, 1) for i in range(min(max_num_seqs, max_num_batched_tokens))]
    steps = [prompts, decoding]
    if last_exit is not None:
        several = [rows for rows in steps if len(rows) > 1]
        steps = [[*rows[:-1], replace(rows[-1], exit_layer=last_exit)] for rows in several]
    return [StepPlan(rows=tuple(rows), depth_cap=depth) for rows in steps]
