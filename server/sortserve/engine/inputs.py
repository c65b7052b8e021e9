"""Plan to tensors, and nothing else. Shape legend in ``sortserve.model.batch``."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sortserve.core.plan import StepPlan
from sortserve.engine.prompt_scores import scored_tokens
from sortserve.engine.transfers import upload
from sortserve.model.batch import Batch, last_tokens, single_rows
from sortserve.model.host_batch import HostBatch

__all__ = ["build_batch", "host_batch", "upload_batch"]


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
    host = host_batch(plan, block_size=block_size, num_slabs=num_slabs)
    batch = upload_batch(host, torch.device(device), last_ids_R)
    scored = scored_tokens(plan, device)
    return batch if scored is None else replace(batch, scored=scored)


def host_batch(plan: StepPlan, *, block_size: int, num_slabs: int) -> HostBatch:
    """The same on the host; the arrays are new ones.

    Args:
        plan: rows, deepest first.
        block_size: tokens of a page.
        num_slabs: slabs of the full model.
    """
    rows = plan.rows
    exit_layers = tuple([row.exit_layer for row in rows])
    assert all(a >= b for a, b in itertools.pairwise(exit_layers))
    parts = [row.token_ids for row in rows]
    starts = np.array([row.start for row in rows], dtype=np.int64)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    token_ids_T = np.array(list(itertools.chain.from_iterable(parts)), dtype=np.int64)
    if len(token_ids_T) == len(rows):  # each has one
        query_starts, row_T = np.arange(len(rows) + 1), np.arange(len(rows))
        positions_T = starts
    else:
        query_starts = np.concatenate([[0], np.cumsum(lengths)])
        row_T = np.repeat(np.arange(len(rows)), lengths)
        positions_T = np.arange(query_starts[-1]) - query_starts[row_T] + starts[row_T]

    context_lens = starts + lengths
    num_blocks = (-(-context_lens // block_size)).tolist()
    tables_SRB = np.full((num_slabs, len(rows), max(num_blocks)), -1, dtype=np.int32)
    for r, row in enumerate(rows):
        table, width = row.block_table_SB, num_blocks[r]
        tables_SRB[: table.shape[0], r, :width] = table[:, :width]

    block_T, offset_T = np.divmod(positions_T, block_size)
    pages_ST = tables_SRB[:, row_T, block_T].astype(np.int64)
    return HostBatch(
        token_ids_T=token_ids_T,
        positions_T=positions_T,
        query_starts=tuple(query_starts.tolist()),
        context_lens=tuple(context_lens.tolist()),
        exit_layers=exit_layers,
        samples=tuple([row.sampling is not None for row in rows]),
        block_tables_SRB=tables_SRB,
        slots_ST=np.where(pages_ST >= 0, pages_ST * block_size + offset_T, -1),
        num_prompt_tokens=tuple([row.num_prompt_tokens for row in rows]),
        taken=tuple([(r, n) for r, row in enumerate(rows) if (n := row.token_from) is not None]),
    )


def upload_batch(host: HostBatch, device: torch.device, last_ids_R: Tensor | None = None) -> Batch:
    """The batch on a device; the arguments are those of ``build_batch``."""
    starts, taken = host.query_starts, host.taken
    token_ids, positions, slots, singles, lasts, taken_tokens, taken_from, *others = upload(
        [
            host.token_ids_T,
            host.positions_T,
            host.slots_ST,
            np.array(single_rows(starts), dtype=np.int64),
            np.array(last_tokens(starts, host.samples), dtype=np.int64),
            np.array([starts[r + 1] - 1 for r, _ in taken], dtype=np.int64),
            np.array([n for _, n in taken], dtype=np.int64),
            np.array(starts, dtype=np.int32),
            np.array(host.context_lens, dtype=np.int32),
            host.block_tables_SRB,
        ],
        device,
    )
    starts_R1, lens_R, tables = others
    if taken:
        assert last_ids_R is not None
        assert max(n for _, n in taken) < len(last_ids_R), "the plan before has not sampled it"
        token_ids = token_ids.index_copy(0, taken_tokens, last_ids_R.index_select(0, taken_from))
    return Batch(
        token_ids_T=token_ids,
        positions_T=positions,
        query_starts=starts,
        context_lens=host.context_lens,
        exit_layers=host.exit_layers,
        samples=host.samples,
        query_starts_R1=starts_R1,
        context_lens_R=lens_R,
        block_tables_SRB=tables,
        slots_ST=slots,
        num_prompt_tokens=host.num_prompt_tokens,
        last_tokens_N=lasts,
        single_rows_N=singles,
    )
