"""Plan to tensors, and nothing else. Shape legend in ``sortserve.model.batch``."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from sortserve.core.plan import StepPlan
from sortserve.engine.prompt_scores import scored_tokens
from sortserve.engine.transfers import upload
from sortserve.model.batch import Batch, last_tokens, single_rows

__all__ = ["build_batch"]


def build_batch(
    plan: StepPlan,
    *,
    block_size: int,
    num_slabs: int,
    device: torch.device | str = "cpu",
    last_ids_R: Tensor | None = None,
) -> Batch:
    """The batch of a plan.

    Args:
        plan: rows, deepest first.
        block_size: tokens of a page.
        num_slabs: slabs of the full model.
        device: where the tensors go.
        last_ids_R: on that device, what the plan before sampled: int64, one for each row that did.
            None: no row takes its token from there (``RowPlan.token_from``).
    """
    rows = plan.rows
    assert all(a.exit_layer >= b.exit_layer for a, b in itertools.pairwise(rows))
    lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    query_starts = np.concatenate([[0], np.cumsum(lengths)])
    row_T = np.repeat(np.arange(len(rows)), lengths)
    positions_T = np.arange(query_starts[-1]) - query_starts[row_T] + starts[row_T]
    token_ids_T = np.concatenate([np.asarray(row.token_ids, dtype=np.int64) for row in rows])

    context_lens = starts + lengths
    num_blocks = -(-context_lens // block_size)
    tables_SRB = np.full((num_slabs, len(rows), int(num_blocks.max())), -1, dtype=np.int32)
    for r, row in enumerate(rows):
        table = row.block_table_SB[:, : num_blocks[r]]
        tables_SRB[: table.shape[0], r, : table.shape[1]] = table

    pages_ST = tables_SRB[:, row_T, positions_T // block_size].astype(np.int64)
    slots_ST = np.where(pages_ST >= 0, pages_ST * block_size + positions_T % block_size, -1)

    samples = tuple(row.sampling is not None for row in rows)
    starts_tuple = tuple(query_starts.tolist())
    taken = [(r, row.token_from) for r, row in enumerate(rows) if row.token_from is not None]
    token_ids, positions, slots, singles, lasts, taken_tokens, taken_from, *others = upload(
        [
            token_ids_T,
            positions_T,
            slots_ST,
            np.array(single_rows(starts_tuple), dtype=np.int64),
            np.array(last_tokens(starts_tuple, samples), dtype=np.int64),
            query_starts[1:][np.array([r for r, _ in taken], dtype=np.int64)] - 1,
            np.array([n for _, n in taken], dtype=np.int64),
            query_starts.astype(np.int32),
            context_lens.astype(np.int32),
            tables_SRB,
        ],
        torch.device(device),
    )
    starts_R1, lens_R, tables = others
    if taken:
        assert last_ids_R is not None
        assert max(n for _, n in taken) < len(last_ids_R), "the plan before has not sampled it"
        token_ids = token_ids.index_copy(0, taken_tokens, last_ids_R.index_select(0, taken_from))
    return Batch(
        token_ids_T=token_ids,
        positions_T=positions,
        query_starts=starts_tuple,
        context_lens=tuple(context_lens.tolist()),
        exit_layers=tuple(row.exit_layer for row in rows),
        samples=samples,
        query_starts_R1=starts_R1,
        context_lens_R=lens_R,
        block_tables_SRB=tables,
        slots_ST=slots,
        num_prompt_tokens=tuple(row.num_prompt_tokens for row in rows),
        last_tokens_N=lasts,
        single_rows_N=singles,
        scored=scored_tokens(plan, device),
    )
