"""Masks of tokens that may not come, made beside the step and applied to its logits.

Shapes: R rows of the batch, N those with a mask, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.grammar import GrammarError, num_words
from sortserve.core.sampling_params import RowFailure, SamplingRow

__all__ = [
    "MaskMaker",
    "Masks",
    "apply_bitmask_on_device",
    "apply_bitmasks",
    "failures_of",
    "make_masks",
    "words_of",
]

_ADDED = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") > 0,
    np.float32(0.0),
    np.float32(-math.inf),
)
"""What each value of a byte of a mask adds to the logits of its eight tokens."""

Masks = Mapping[SamplingRow, NDArray[np.int32] | RowFailure]
"""Of each constrained row the words of its mask [W], or why there is none."""


def make_masks(rows: Sequence[SamplingRow], vocab_size: int) -> Masks:
    """The masks of the rows that are constrained; nothing of a row changes.

    Below ``min_tokens`` the tokens that end the request are left out, unless no other may come.
    """
    masks: dict[SamplingRow, NDArray[np.int32] | RowFailure] = {}
    for row in rows:
        if row.constraint is None:
            continue
        mask_W = np.empty(num_words(vocab_size), dtype=np.int32)
        is_early = len(row.output_token_ids) < row.params.min_tokens
        try:
            row.constraint.fill_mask(mask_W, without=row.stop_token_ids if is_early else ())
        except GrammarError as error:
            masks[row] = RowFailure("grammar", str(error))
        else:
            masks[row] = mask_W
    return masks


def failures_of(rows: Sequence[SamplingRow], masks: Masks) -> dict[int, RowFailure]:
    """The rows that have no mask, by their index, and why."""
    return {r: f for r, row in enumerate(rows) if isinstance(f := masks.get(row), RowFailure)}


def words_of(rows: Mapping[int, SamplingRow], masks: Masks) -> dict[int, NDArray[np.int32]]:
    """The words [W] of each of these rows that is constrained and has a mask, by its index."""
    constrained = {r: masks[row] for r, row in rows.items() if row.constraint is not None}
    return {r: words for r, words in constrained.items() if isinstance(words, np.ndarray)}


class MaskMaker:
    """Makes masks on a thread of its own, while the model runs.

    It is one thread: two steps never ask one matcher at the same time.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def start(self, rows: Sequence[SamplingRow], vocab_size: int) -> Future[Masks] | None:
        """Begin with the masks of a step; None: no row is constrained."""
        if all(row.constraint is None for row in rows):
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="masks")
        return self._pool.submit(make_masks, rows, vocab_size)


def apply_bitmasks(logits_RV: Tensor, masks: Mapping[int, NDArray[np.int32]]) -> None:
    """Set the logits of tokens whose bit is clear to -inf, in place, on the CPU.

    Args:
        logits_RV: none of them plus infinity.
        masks: of some rows, W words each; token t is bit ``t % 32`` of word ``t // 32``.
    """
    vocab_size = logits_RV.shape[1]
    # Eight tokens a byte are looked up and added, on this thread alone: 35 microseconds a row
    # of 49,152, where shifts or choosing one by one take hundreds.
    logits = logits_RV.numpy()
    added = np.empty((4 * num_words(vocab_size), 8), dtype=np.float32)
    for r, mask_W in masks.items():
        as_bytes = mask_W.astype("<i4", copy=False).view(np.uint8)
        np.take(_ADDED, as_bytes, axis=0, out=added, mode="clip")
        logits[r] += added.reshape(-1)[:vocab_size]


def apply_bitmask_on_device(logits_RV: Tensor, row_N: Tensor, mask_NW: Tensor) -> None:
    """The same as tensor operations, with the arguments on the device of the logits.

    Args:
        logits_RV: as above.
        row_N: int64.
        mask_NW: int32.
    """
    vocab_size = logits_RV.shape[1]
    shift_32 = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    bits_NWB = (mask_NW[:, :, None] >> shift_32) & 1
    allowed_NV = bits_NWB.flatten(1)[:, :vocab_size].bool()
    logits_NV = logits_RV.index_select(0, row_N).masked_fill_(~allowed_NV, -math.inf)
    logits_RV.index_copy_(0, row_N, logits_NV)
