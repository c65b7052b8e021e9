"""What the rows of a step ask of the sampler, sent to the device in one copy.

Shapes: as in ``sampling.batched``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.grammar import num_words
from sortserve.core.sampling_params import SamplingRow
from sortserve.engine.sampling.bitmask import Masks, words_of
from sortserve.engine.sampling.dense_filters import RowFilters
from sortserve.engine.sampling.edits import Editor, is_edited
from sortserve.engine.sampling.filters import has_filter
from sortserve.engine.sampling.row import noise_of, temperature_of
from sortserve.engine.transfers import upload

__all__ = ["Draws", "Orders", "upload_orders"]

_ROWS_AT_ONCE = 32
"""Rows that are filtered together: each takes some 50 bytes for every token of the vocabulary."""


@dataclass(frozen=True)
class Draws:
    """Rows that draw their token, all with a filter or all without."""

    row_N: Tensor
    """int64, ascending."""
    temperature_N: Tensor
    """float32"""
    noise_N: Tensor
    """float64"""
    filters: RowFilters | None


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What is to be done, tensors on the device."""

    has_edits: bool
    at_P: Tensor
    penalty_P: Tensor
    added_P: Tensor
    masked_M: Tensor
    """These four as in ``Edits``."""
    constrained_N: Tensor
    """Rows that have a grammar's mask, int64."""
    mask_NW: Tensor
    """Their masks, int32."""
    draws: list[Draws]
    reporting: list[int]
    """Rows that want log-probabilities."""
    reporting_N: Tensor
    """The same, int64."""
    num_top: list[int]
    """How many of its likeliest tokens each of these wants."""


def upload_orders(
    rows: Sequence[SamplingRow],
    editor: Editor,
    vocab_size: int,
    device: torch.device,
    masks: Masks,
) -> Orders:
    """The orders of these rows.

    Args:
        rows: of the batch.
        editor: knows what is to be edited.
        vocab_size: V.
        device: of the logits.
        masks: of the constrained rows.
    """
    edited = {r: row for r, row in enumerate(rows) if is_edited(row)}
    edits = editor.edits(edited, vocab_size)
    reporting = [r for r, row in enumerate(rows) if row.params.logprobs is not None]
    groups = _groups(rows)
    words = words_of(edited, masks)
    mask_NW = np.array(list(words.values()), dtype=np.int32).reshape(-1, num_words(vocab_size))
    arrays: list[NDArray[Any]] = [edits.at_P, edits.penalty_P, edits.added_P, edits.masked_M]
    arrays += [np.array(reporting, dtype=np.int64), np.array(list(words), dtype=np.int64), mask_NW]
    for group in groups:
        arrays += [
            np.array(group, dtype=np.int64),
            np.array([temperature_of(rows[r]) for r in group], dtype=np.float32),
            np.array([noise_of(rows[r]) for r in group], dtype=np.float64),
            *RowFilters.arrays([rows[r].params for r in group]),
        ]
    sent = upload(arrays, device)
    at_P, penalty_P, added_P, masked_M, reporting_N, constrained_N, sent_mask_NW, *rest = sent
    draws: list[Draws] = []
    for group in groups:
        size = len(rest) // (len(groups) - len(draws))
        row_N, temperature_N, noise_N, *columns = rest[:size]
        del rest[:size]
        filters = RowFilters(*columns) if has_filter(rows[group[0]].params) else None
        draws.append(Draws(row_N, temperature_N, noise_N, filters))
    return Orders(
        has_edits=bool(edited),
        at_P=at_P,
        penalty_P=penalty_P,
        added_P=added_P,
        masked_M=masked_M,
        constrained_N=constrained_N,
        mask_NW=sent_mask_NW,
        draws=draws,
        reporting=reporting,
        reporting_N=reporting_N,
        num_top=[rows[r].params.logprobs or 0 for r in reporting],
    )


def _groups(rows: Sequence[SamplingRow]) -> list[list[int]]:
    """The rows that draw: those without a filter together, the others some at a time."""
    drawn = [r for r, row in enumerate(rows) if not row.params.greedy]
    unfiltered = [r for r in drawn if not has_filter(rows[r].params)]
    filtered = [r for r in drawn if has_filter(rows[r].params)]
    parts = [filtered[i : i + _ROWS_AT_ONCE] for i in range(0, len(filtered), _ROWS_AT_ONCE)]
    return [group for group in (unfiltered, *parts) if group]
