"""What penalties, logit_bias and min_tokens do to the logits, for all rows at once.

Which logits of a row are touched, and by how much, changes by one token from step to step. So it is
kept for each row (``RowEdits``) and brought up to date by the tokens that are new; a step joins
what the rows have and touches these logits alone.

Shapes: R rows of the batch, V vocabulary, P touched logits of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.sampling_params import SamplingParams, SamplingRow

__all__ = [
    "HUGE_LOGIT",
    "Editor",
    "Edits",
    "RowEdits",
    "apply_edits",
    "is_below_min_tokens",
    "is_edited",
    "is_plain",
    "is_touched",
]

_LOWEST_PENALTY = 1e-12
"""0 in all but name."""
HUGE_LOGIT = 1e18
"""No edited logit is larger. So they stay finite in float32: 1e6 over the lowest penalty is the
huge logit, and that over the lowest temperature is 1e38."""


def is_edited(row: SamplingRow) -> bool:
    """Whether any logit of the row is changed before one is chosen."""
    return is_touched(row) or row.constraint is not None


def is_touched(row: SamplingRow) -> bool:
    """The same, a grammar's mask apart."""
    return _touches_some(row.params) or is_below_min_tokens(row)


def is_below_min_tokens(row: SamplingRow) -> bool:
    """Whether the tokens that would end the request are masked; a grammar's mask has that done."""
    return row.constraint is None and len(row.output_token_ids) < row.params.min_tokens


def is_plain(row: SamplingRow) -> bool:
    """Whether the row's token is the first of its largest logits, and nothing else is wanted."""
    return row.params.greedy and row.params.logprobs is None and not is_edited(row)


class RowEdits:
    """The touched logits of one row: their ids, and for each a factor and what is added.

    ``token_ids``, ``penalties`` and ``additions`` are views of equal length, each id once. The
    penalty is the repetition penalty for tokens of prompt and output, and 1 for others.
    """

    def __init__(self, row: SamplingRow) -> None:
        params = row.params
        self._repetition_penalty = max(params.repetition_penalty, _LOWEST_PENALTY)
        self._place: dict[int, int] = {}
        self._count: list[int] = []
        self._num_counted = 0
        prompt = row.prompt_token_ids if params.repetition_penalty != 1.0 else ()
        self._place = {id_: i for i, id_ in enumerate(dict.fromkeys(prompt))}
        num_prompt = len(self._place)
        for token_id in params.logit_bias:
            self._place.setdefault(token_id, len(self._place))
        size = len(self._place)
        self._count = [0] * size
        self._token_ids = np.fromiter(self._place, dtype=np.int64, count=size)
        self._penalties = np.ones(size, dtype=np.float32)
        self._penalties[:num_prompt] = self._repetition_penalty
        self._additions = np.zeros(size, dtype=np.float32)
        for token_id, bias in params.logit_bias.items():
            self._additions[self._place[token_id]] = bias

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Ids of the touched logits."""
        return self._token_ids[: len(self._count)]

    @property
    def penalties(self) -> NDArray[np.float32]:
        """Divides positive logits and multiplies negative ones."""
        return self._penalties[: len(self._count)]

    @property
    def additions(self) -> NDArray[np.float32]:
        """Presence and frequency penalties and bias together, added after the penalty."""
        return self._additions[: len(self._count)]

    def catch_up(self, row: SamplingRow) -> None:
        """Count the row's tokens that came since the last time."""
        if row.params.has_penalties:
            for token_id in row.output_token_ids[self._num_counted :]:
                self._add(token_id, row.params)
            self._num_counted = len(row.output_token_ids)

    def _add(self, token_id: int, params: SamplingParams) -> None:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._count):
            self._count.append(0)
            if place == len(self._token_ids):
                self._make_room()
            self._token_ids[place] = token_id
        self._count[place] += 1
        self._penalties[place] = self._repetition_penalty
        penalty = -params.presence_penalty - params.frequency_penalty * self._count[place]
        self._additions[place] = penalty + params.logit_bias.get(token_id, 0.0)

    def _make_room(self) -> None:
        padding = (0, max(16, len(self._token_ids)))
        self._token_ids = np.pad(self._token_ids, padding)
        self._penalties = np.pad(self._penalties, padding)
        self._additions = np.pad(self._additions, padding)


@dataclass(frozen=True)
class Edits:
    """What is to be done to the logits of a batch; places are those of its flat [R * V]."""

    at_P: NDArray[np.int64]
    """The touched logits, each once."""
    penalty_P: NDArray[np.float32]
    added_P: NDArray[np.float32]
    masked_M: NDArray[np.int64]
    """Those that min_tokens masks."""


class Editor:
    """Edits logits in place. Remembers the edits of each ``SamplingRow`` as long as that lives."""

    def __init__(self) -> None:
        self._edits: WeakKeyDictionary[SamplingRow, RowEdits] = WeakKeyDictionary()

    def edits(self, rows: Mapping[int, SamplingRow], vocab_size: int) -> Edits:
        """Penalties, bias and the min_tokens mask of these rows, by their index in the batch."""
        touched = {r: self._edits_of(row) for r, row in rows.items() if _touches_some(row.params)}
        for edits in touched.values():
            ids = edits.token_ids
            assert not ids.size or ids.max() < vocab_size, f"token {ids.max()} of {vocab_size}"
        masked = [
            r * vocab_size + token_id
            for r, row in rows.items()
            if is_below_min_tokens(row)
            for token_id in row.stop_token_ids
            if token_id < vocab_size
        ]
        return Edits(
            _joined([edits.token_ids + r * vocab_size for r, edits in touched.items()], np.int64),
            _joined([edits.penalties for edits in touched.values()], np.float32),
            _joined([edits.additions for edits in touched.values()], np.float32),
            np.array(masked, dtype=np.int64),
        )

    def edit(self, logits_RV: Tensor, rows: Mapping[int, SamplingRow]) -> Callable[[], object]:
        """Apply penalties, bias and the min_tokens mask, on the CPU.

        Returns:
            What takes penalties and bias back, as long as nothing else was written there.

        Args:
            logits_RV: contiguous; only the rows named are touched.
            rows: those to edit, by their index in the batch.
        """
        if not rows:
            return lambda: None
        edits = self.edits(rows, logits_RV.shape[1])
        at_P = torch.from_numpy(edits.at_P)
        old_P = apply_edits(
            logits_RV,
            at_P,
            *map(torch.from_numpy, (edits.penalty_P, edits.added_P, edits.masked_M)),
        )
        return lambda: logits_RV.view(-1).index_copy_(0, at_P, old_P)

    def _edits_of(self, row: SamplingRow) -> RowEdits:
        edits = self._edits.get(row)
        if edits is None:
            edits = self._edits[row] = RowEdits(row)
        edits.catch_up(row)
        return edits


def apply_edits(
    logits_RV: Tensor, at_P: Tensor, penalty_P: Tensor, added_P: Tensor, masked_M: Tensor
) -> Tensor:
    """Do what ``Edits`` say, in place, on any device; returns the old logits [P]."""
    flat = logits_RV.view(-1)
    old_P = flat.index_select(0, at_P)
    if len(at_P):
        new_P = torch.where(old_P < 0, old_P * penalty_P, old_P / penalty_P).clamp_(max=HUGE_LOGIT)
        flat.index_copy_(0, at_P, new_P.add_(added_P))
    if len(masked_M):
        flat.index_fill_(0, masked_M, -math.inf)
    return old_P


def _touches_some(params: SamplingParams) -> bool:
    return params.has_penalties or bool(params.logit_bias)


_Number = TypeVar("_Number", np.int64, np.float32)


def _joined(parts: list[NDArray[_Number]], dtype: type[_Number]) -> NDArray[_Number]:
    return np.concatenate([np.empty(0, dtype=dtype), *parts])
