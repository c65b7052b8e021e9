"""One step's rows as tensors: what the engine hands to the decoder.

Shape legend: T tokens of all rows (no padding), R rows, S slabs, B blocks of the longest row.
Rows are ordered deepest first, so the rows alive in any segment are a prefix of the batch, and so
are their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of one step. Tensors live on the model's device, tuples on the host."""

    token_ids_T: Tensor
    """int64"""
    positions_T: Tensor
    """int64"""
    query_starts: tuple[int, ...]
    """R + 1 offsets into T: row r holds tokens query_starts[r] to query_starts[r + 1]."""
    context_lens: tuple[int, ...]
    """R: tokens in the cache after this step has written its own (start + number of tokens)."""
    exit_layers: tuple[int, ...]
    """R, descending."""
    samples: tuple[bool, ...]
    """R: whether the row's last token passes the head."""
    query_starts_R1: Tensor
    """int32, the same as query_starts."""
    context_lens_R: Tensor
    """int32, the same as context_lens."""
    block_tables_SRB: Tensor
    """int32 page ids: [slab, row, block of tokens]; entries past a row's end or depth are -1."""
    slots_ST: Tensor
    """int64: page * block_size + offset at which each token's KV is written; -1 below no slab."""
    num_prompt_tokens: tuple[int, ...] | None = None
    """R: how many of the row's tokens in this step are of its prompt; the others were generated.
    None: those of rows with few tokens count as generated."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.query_starts[-1]
