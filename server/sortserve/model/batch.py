"""One step's rows as tensors: what the engine hands to the decoder.

Shape legend: T tokens of all rows (no padding), R rows, S slabs, B blocks of the longest row.
Rows are ordered deepest first, so the rows alive in any segment are a prefix of the batch, and so
are their tokens.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sortserve.model.scored import ScoredTokens

__all__ = ["Batch", "last_tokens", "single_rows"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of one step. Tensors live on the model's device, tuples on the host.

    What is computed from the tensors must not be looked at by the host: it would wait for the
    device. What the host has to know (sizes of launches, which rows are alive) is in the tuples.
    """

    token_ids_T: Tensor
    """int64. They may come from a step that the device is still running: the host never looks."""
    positions_T: Tensor
    """int64"""
    query_starts: tuple[int, ...]
    """R + 1 offsets into T: row r holds tokens query_starts[r] to query_starts[r + 1]."""
    context_lens: tuple[int, ...]
    """R: tokens in the cache after this step has written its own (start + number of tokens). Where
    ``is_recorded``, no more than upper bounds."""
    exit_layers: tuple[int, ...]
    """R, descending."""
    samples: tuple[bool, ...]
    """R: whether the row's last token passes the head."""
    query_starts_R1: Tensor
    """int32, the same as query_starts."""
    context_lens_R: Tensor
    """int32, the same as context_lens."""
    block_tables_SRB: Tensor
    """int32 page ids: [slab, row, block of tokens]; entries past a row's end or depth are -1.
    Contiguous. Where ``is_recorded`` there are more rows than the batch has, and no entry is -1:
    of a row that is no more than padding, they are a page that nobody else has."""
    slots_ST: Tensor
    """int64: page * block_size + offset at which each token's KV is written; -1: nowhere, in slabs
    below which its row leaves."""
    num_prompt_tokens: tuple[int, ...] | None = None
    """R: how many of the row's tokens in this step are of its prompt; the others were generated.
    None: those of rows with few tokens count as generated."""
    last_tokens_N: Tensor = field(default=None)  # type: ignore[assignment]
    """int64: the last token of each row that samples, in their order. Left out: made here."""
    single_rows_N: Tensor = field(default=None)  # type: ignore[assignment]
    """int64: the rows that have one token, ascending. Left out: made here."""
    is_recorded: bool = False
    """The launches for this batch are recorded now and run again later, on what the same tensors
    hold by then (``sortserve.model.graphs``): every row has one token, and nothing but the tensors
    may decide the result."""
    writes: bool = True
    """Whether keys and values are written; if not, all ``slots_ST`` are -1."""
    scored: ScoredTokens | None = None
    """Tokens whose hidden states are wanted too; None: none."""

    def __post_init__(self) -> None:
        rows = single_rows(self.query_starts), last_tokens(self.query_starts, self.samples)
        for name, values in zip(("single_rows_N", "last_tokens_N"), rows, strict=True):
            if getattr(self, name) is None:
                tensor = torch.tensor(values, dtype=torch.int64, device=self.token_ids_T.device)
                object.__setattr__(self, name, tensor)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.query_starts[-1]

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token."""
        return self.num_tokens == self.num_rows

    def num_rows_deeper_than(self, layer: int) -> int:
        """Rows whose exit is above ``layer``: a prefix, as exits descend."""
        return bisect_left(self.exit_layers, -layer, key=lambda exit_layer: -exit_layer)


def single_rows(query_starts: Sequence[int]) -> list[int]:
    """The rows of one token."""
    return [r for r, (a, b) in enumerate(itertools.pairwise(query_starts)) if b - a == 1]


def last_tokens(query_starts: Sequence[int], samples: Sequence[bool]) -> list[int]:
    """The last token of each row that samples."""
    return [end - 1 for end, does in zip(query_starts[1:], samples, strict=True) if does]
