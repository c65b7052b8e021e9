"""Live demands as columns: what arithmetic over all of them starts from (no torch).

To take hundreds of objects apart costs more than most questions about them. So it is done once for
each state of the engine, and only for the demands that are new in it; whoever asks next, be it the
policy, the desk or a forecast, finds the columns ready.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import attrgetter, is_

import numpy as np
from numpy.typing import NDArray

from sortserve.scheduling.demand import Demand

__all__ = ["Columns", "Floats", "LiveDemands", "Mask"]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_FIELDS = (
    *("exit_layer", "floor_layer", "num_pending", "context_len", "gap_s", "due_s"),
    *("is_hard", "is_promised", "is_waiting", "is_lost", "weight", "num_left", "num_done"),
    *("next_share", "num_ready", "num_scored", "end_s", "next_by_s"),
)
_ROW = attrgetter(*_FIELDS)


@dataclass(frozen=True, eq=False)
class Columns:
    """What demands say, before any cost is known: [n] each."""

    exit_layer: Floats
    floor_layer: Floats
    num_pending: Floats
    context_len: Floats
    gap_s: Floats
    due_s: Floats
    is_hard: Mask
    is_promised: Mask
    is_waiting: Mask
    is_decoding: Mask
    weight: Floats
    """What an answer is worth; 0 where it comes too late in any case."""
    left_share: Floats
    next_share: Floats
    num_left: Floats
    num_scored: Floats
    end_s: Floats
    next_by_s: Floats

    @classmethod
    def of(cls, demands: Sequence[Demand]) -> Columns:
        """The columns of some demands; of ``LiveDemands`` the ones they have."""
        return demands.columns if isinstance(demands, LiveDemands) else _columns(_values(demands))

    def rows(self, mask: Mask) -> Columns:
        """Some of these demands."""
        return Columns(*(column[mask] for column in vars(self).values()))

    def plus(self, other: Columns) -> Columns:
        """These demands, and others after them."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Columns(*(np.concatenate(pair) for pair in pairs))


class LiveDemands(tuple[Demand, ...]):
    """Demands at one moment, whose columns are made when they are first asked for, on any thread.

    Args:
        demands: of live requests.
    """

    as_of_s: float = math.inf
    """When they needed this; what is later than now means now."""
    _before: LiveDemands | None = None

    @classmethod
    def of(cls, demands: Iterable[Demand]) -> LiveDemands:
        """These demands; the same object if it is one already."""
        return demands if isinstance(demands, LiveDemands) else cls(demands)

    @classmethod
    def after(cls, before: LiveDemands, demands: Iterable[Demand]) -> LiveDemands:
        """Demands a moment later; those that are the same objects are not taken apart again.

        The same object if nothing has changed.
        """
        live = cls(demands)
        if len(live) == len(before) and all(map(is_, live, before)):
            return before
        live._before = before if "_values" in vars(before) else before._before
        return live

    @cached_property
    def columns(self) -> Columns:
        """The same as columns."""
        return _columns(self._values)

    @cached_property
    def _values(self) -> Floats:
        """[fields, n] what each of them says."""
        before, self._before = self._before, None  # nobody keeps all that ever was
        if not before:
            return _values(self)
        if len(before) <= len(self) and all(map(is_, before, self)):  # what is new comes after them
            return np.concatenate((before._values, _values(self[len(before) :])), axis=1)
        at = {id(demand): i for i, demand in enumerate(before)}
        rows = np.array([at.get(id(demand), -1) for demand in self], dtype=np.intp)
        values: Floats = before._values[:, rows]
        new = np.flatnonzero(rows < 0)
        values[:, new] = _values([self[i] for i in new.tolist()])
        return values


def _values(demands: Sequence[Demand]) -> Floats:
    """[fields, n] what each of some demands says."""
    count = len(demands) * len(_FIELDS)
    flat = np.fromiter(chain.from_iterable(map(_ROW, demands)), np.float64, count)
    return np.ascontiguousarray(flat.reshape(-1, len(_FIELDS)).T)


def _columns(values: Floats) -> Columns:
    exit_layer, floor_layer, pending, context, gap_s, due_s, *rest = values
    hard, promised, waiting, lost, weight, num_left, num_done, *others = rest
    next_share, ready, scored, end_s, next_by_s = others
    return Columns(
        exit_layer=exit_layer,
        floor_layer=floor_layer,
        num_pending=pending,
        context_len=context,
        gap_s=gap_s,
        due_s=due_s,
        is_hard=hard > 0,
        is_promised=promised > 0,
        is_waiting=waiting > 0,
        is_decoding=(pending <= ready) & (context > 0) & (waiting == 0),
        weight=np.where(lost > 0, 0.0, weight),
        left_share=num_left / (num_left + num_done),
        next_share=next_share,
        num_left=num_left,
        num_scored=scored,
        end_s=end_s,
        next_by_s=next_by_s,
    )
