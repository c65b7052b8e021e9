"""All demands beside what they cost, so that many what-ifs take microseconds (no torch).

`capacity` says in words and formulas what is computed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sortserve.cost.model import REGIME_TOKENS
from sortserve.scheduling.columns import Columns, Floats, Mask
from sortserve.scheduling.demand import NO_GAP_S, Demand, StepCosts

__all__ = ["LEAST_TIME_S", "DemandTable", "Levels", "Need", "reading_lines"]

LEAST_TIME_S = 1e-3
"""A prompt that is late counts as due in so many seconds."""

Levels = NDArray[np.intp]
"""For each demand the index of its exit among all exits, shallowest first."""


@dataclass(frozen=True)
class Need:
    """The share of the machine that some demands need, and where they need most."""

    share: float
    """Above 1 some promise will be broken."""
    num_prompts: int
    """The prompts, in the order in which they are due, that decode in the worst moment."""
    until_s: float
    """The time that those and the next one have in that moment; infinite once all decode."""


@dataclass(frozen=True, eq=False)
class DemandTable:
    """Columns over n demands and K exits; ``levels`` arguments say at which exit each one is."""

    layers: Floats
    """[K] the exits, ascending."""
    segment_s: Floats
    """[K] what a step costs more by going down to this exit instead of the one before it."""
    row_s: float
    """What a row costs at any depth."""
    context_s: float
    """What a row costs more per layer for each token of its context."""
    level: Levels
    """[n] where they are."""
    floor: Levels
    """[n] how shallow they may go."""
    rate: Floats
    """[n] tokens a second."""
    next_share: Floats
    """[n] by how much more they are a second for who goes shallower (see ``Demand.at``)."""
    layer_s: Floats
    """[n] what a token costs per layer, beside others."""
    decodes: Mask
    """[n] whether they decode now, or may begin to at any time."""
    promised: Mask
    """[n] whether they were promised a time."""
    weight: Floats
    """[n] what an answer is worth; 0 where it comes too late in any case."""
    left_share: Floats
    """[n] the share of the answer that is still to come."""
    num_left: Floats
    """[n] its tokens."""
    end_s: Floats
    """[n] when it should be over; infinite where nothing was promised of its end."""
    next_by_s: Floats
    """[n] when the next token must be out, whatever time the answer has as a whole."""
    prompts: Levels
    """[P] the promised prompts that are not read yet, in the order in which they are due."""
    due_s: Floats
    """[n]"""
    work_s: Floats
    """[n] reading what is not read yet, 0 for who decodes: at any depth, and"""
    work_layer_s: Floats
    """[n] per layer."""

    @classmethod
    def of(
        cls, demands: Sequence[Demand] | Columns, costs: StepCosts, exits: Sequence[int]
    ) -> DemandTable:
        """Demands beside what they cost; their exits and floors are among ``exits`` (ascending)."""
        columns = demands if isinstance(demands, Columns) else Columns.of(demands)
        layers = np.array(exits, dtype=np.float64)
        bases = [costs.base_s(e) for e in exits]
        row_s, (token_s, context_s) = costs.row_line
        work_s, work_layer_s = reading_lines(columns, costs)
        prompts = np.flatnonzero(columns.is_hard & ~columns.is_decoding)
        return cls(
            layers=layers,
            segment_s=np.array([b - a for a, b in itertools.pairwise([0.0, *bases])]),
            row_s=row_s,
            context_s=context_s,
            level=layers.searchsorted(columns.exit_layer),
            floor=layers.searchsorted(columns.floor_layer),
            rate=1.0 / np.maximum(columns.gap_s, NO_GAP_S),
            next_share=columns.next_share,
            layer_s=token_s + context_s * (columns.context_len + columns.num_pending),
            decodes=columns.is_decoding | (columns.is_promised & ~columns.is_hard),
            promised=columns.is_promised,
            weight=columns.weight,
            left_share=columns.left_share,
            num_left=columns.num_left,
            end_s=columns.end_s,
            next_by_s=columns.next_by_s,
            prompts=_by_due(prompts, columns.due_s),
            due_s=columns.due_s,
            work_s=work_s,
            work_layer_s=work_layer_s,
        )

    def plus(self, other: DemandTable) -> DemandTable:
        """These demands and those of another table of the same costs and exits, at the end."""
        due_s = np.concatenate((self.due_s, other.due_s))
        prompts = np.concatenate((self.prompts, other.prompts + len(self.level)))
        columns = {
            name: np.concatenate((getattr(self, name), getattr(other, name))) for name in _COLUMNS
        }
        return DemandTable(
            **columns,
            layers=self.layers,
            segment_s=self.segment_s,
            row_s=self.row_s,
            context_s=self.context_s,
            prompts=_by_due(prompts, due_s),
            due_s=due_s,
        )

    def plus_one(self, demand: Demand, costs: StepCosts) -> DemandTable:
        """These demands and one more, at the end, of the same costs and exits.

        A tenth of the time of ``of`` and ``plus``.
        """
        exits = self.layers.tolist()
        is_decoding = demand.is_decoding
        token_s, context_s = costs.row_line[1]
        num_pending = 0 if is_decoding else demand.num_pending
        work_s, work_layer_s = costs.reading_line(
            num_pending, demand.context_len, demand.num_scored
        )
        values = {
            "level": exits.index(demand.exit_layer),
            "floor": exits.index(demand.floor_layer),
            "rate": 1.0 / max(demand.gap_s, NO_GAP_S),
            "next_share": demand.next_share,
            "layer_s": token_s + context_s * (demand.context_len + demand.num_pending),
            "decodes": is_decoding or (demand.is_promised and not demand.is_hard),
            "promised": demand.is_promised,
            "weight": 0.0 if demand.is_lost else demand.weight,
            "left_share": demand.num_left / (demand.num_left + demand.num_done),
            "num_left": demand.num_left,
            "end_s": demand.end_s,
            "next_by_s": demand.next_by_s,
            "work_s": work_s,
            "work_layer_s": work_layer_s,
        }
        due_s, prompts = _longer(self.due_s, demand.due_s), self.prompts
        if demand.is_hard and not is_decoding:
            at = np.searchsorted(self.due_s[prompts], demand.due_s, side="right")
            prompts = np.concatenate((prompts[:at], [len(self.level)], prompts[at:]))
        columns = {name: _longer(getattr(self, name), value) for name, value in values.items()}
        return DemandTable(
            **columns,
            layers=self.layers,
            segment_s=self.segment_s,
            row_s=self.row_s,
            context_s=self.context_s,
            prompts=prompts,
            due_s=due_s,
        )

    def without(self, rows: Levels) -> DemandTable:
        """The demands as if some of them asked for nothing."""
        rate, work_s, work_layer_s = self.rate.copy(), self.work_s.copy(), self.work_layer_s.copy()
        for column in (rate, work_s, work_layer_s):
            column[rows] = 0.0
        prompts = self.prompts[~np.isin(self.prompts, rows)]
        return replace(self, rate=rate, work_s=work_s, work_layer_s=work_layer_s, prompts=prompts)

    def decode_share(self, rows: Mask) -> float:
        """The share of the machine that some of the demands take by decoding where they are."""
        level, rate = self.level[rows], self.rate[rows]
        reach = np.where(level[:, None] >= np.arange(len(self.layers)), rate[:, None], 0.0)
        steps = reach.max(axis=0, initial=0.0) @ self.segment_s
        alone = rate @ (self.row_s + self.layers[level] * self.layer_s[rows])
        return float(steps + alone)

    def need(
        self,
        levels: Levels,
        *,
        now: float,
        busy_s: float = 0.0,
        from_due_s: float = -np.inf,
        least_time_s: float = LEAST_TIME_S,
    ) -> Need:
        """What the demands need at these exits.

        Args:
            levels: [n] where each one is.
            now, busy_s, from_due_s: see ``capacity.pressure``.
            least_time_s: no prompt counts as due sooner.
        """
        prompts = self.prompts
        rate = self.rate
        if levels is not self.level:
            rate = np.where(levels < self.level, rate * self.next_share, rate)
        depth = self.layers[levels]
        row = rate * (self.row_s + depth * self.layer_s)
        steps = np.where(levels[:, None] >= np.arange(len(self.layers)), rate[:, None], 0.0)
        joined = np.empty((len(prompts) + 1, len(self.layers)))
        steps.max(axis=0, initial=0.0, where=self.decodes[:, None], out=joined[0])
        joined[1:] = steps[prompts]
        np.maximum.accumulate(joined, out=joined)  # as one prompt after the other has been read
        rows = np.empty(len(prompts) + 1)
        rows[0] = row.sum(where=self.decodes)
        rows[1:] = row[prompts]
        rows = rows.cumsum()
        share = joined @ self.segment_s + rows
        if not len(prompts):
            return Need(float(share[0]), 0, np.inf)
        due_s = self.due_s[prompts]
        time_s = np.maximum(due_s - now - busy_s, least_time_s)
        work_s = np.cumsum(self.work_s[prompts] + depth[prompts] * self.work_layer_s[prompts])
        share[:-1] += np.where(due_s >= from_due_s, work_s / time_s, 0.0)
        worst = int(share.argmax())
        until_s = float(time_s[worst]) if worst < len(prompts) else np.inf
        return Need(float(share[worst]), worst, until_s)


_COLUMNS = (
    *("level", "floor", "rate", "next_share", "layer_s", "decodes", "promised", "weight"),
    *("left_share", "num_left", "end_s", "next_by_s", "work_s", "work_layer_s"),
)
"""What a table says of each of its demands, beside when it is due."""


def _longer(column: Any, value: float) -> Any:
    """A column with one more value, of its own type."""
    longer = np.empty(len(column) + 1, column.dtype)
    longer[:-1], longer[-1] = column, value
    return longer


def _by_due(prompts: Levels, due_s: Floats) -> Levels:
    return prompts[np.argsort(due_s[prompts], kind="stable")]


def reading_lines(columns: Columns, costs: StepCosts) -> tuple[Floats, Floats]:
    """Seconds to read the prompts (``StepCosts.prefill_s``), as a line over the layers.

    [n] each: 0 for who decodes.
    """
    at_all, per_layer = np.zeros((2, len(columns.exit_layer)))
    reads = np.flatnonzero(~columns.is_decoding & (columns.num_pending > 0))
    if len(reads):
        at_all[reads], per_layer[reads] = _lines_of(columns, reads, costs)
    return at_all, per_layer


def _lines_of(columns: Columns, rows: Levels, costs: StepCosts) -> tuple[Floats, Floats]:
    pending, context, chunk = columns.num_pending[rows], columns.context_len[rows], costs.chunk
    small = np.minimum(pending, chunk) <= REGIME_TOKENS
    lines = np.array([costs.model.large, costs.model.small])
    c0, a, b, d, h = lines[small.astype(np.intp)].T
    num_steps = np.ceil(pending / chunk)
    kv_tokens = pending * (context + pending / 2)
    at_all = costs.safety * (num_steps * c0 + h * (1.0 + columns.num_scored[rows]))
    return at_all, costs.safety * (num_steps * a + b * pending + d * kv_tokens)
