"""What every answer would have to spare if each step ran everybody (no torch).

Promises are kept by one of two courses. *Pacing* runs each row as often as its promise needs, and
holds back those that have time (``capacity``). The *full batch* is what engines without promises
do: prompts are read as they come, and each step runs all rows. It makes the most of every step,
and its ends are known. With n(1) <= n(2) <= ... the tokens left of the rows,

    over(i) = now + all prompts + sum over j <= i of (n(j) - n(j - 1)) * step(j)

where step(j) runs down to the deepest of the rows j, j + 1, ... and carries all of them, their
contexts as long as they are in the middle of those steps, and a prompt counts for what it adds to
the step in which it is read. Where no answer is over too late by this, every promise can be kept
without holding anybody back.

An answer with a pace may end sooner than it is planned to. Its mean is kept only if it is kept at
each token, so it spares no more than it has saved by now.

Prompts of those who were promised nothing count for nothing: they are read in time to spare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sortserve.scheduling.columns import Columns, Floats, Mask
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.demand_table import DemandTable, Levels

__all__ = ["Course", "course", "least_spare_s", "least_uniform_lowering"]


@dataclass(frozen=True, eq=False)
class Course:
    """A full batch from now on."""

    levels: Levels
    """[n] where each request is."""
    rows: Levels
    """[m] who takes part in it, in the order in which they end."""
    num_steps: Floats
    """[m] steps until each one's end, ascending."""
    over_s: Floats
    """[m] seconds until each one's end, the prompts that are read first included."""
    reading_s: float
    """Of all prompts, beside the steps in which they are read."""
    first_step_s: float
    """Of the first step, beside the prompts."""

    def spare_s(self, table: DemandTable, *, now: float, busy_s: float = 0.0) -> Floats:
        """[n] seconds between each answer's end and when it should be over.

        Infinite for who has no time to keep; below 0 where pacing alone could still be in time.

        Args:
            table: what the course was made of, or the same with other due times.
            now: the engine's clock.
            busy_s: until the machine can begin with it; below 0: it has begun so long ago.
        """
        spare = np.full(len(self.levels), np.inf)
        spare[self.rows] = table.end_s[self.rows] - now - busy_s - self.over_s
        return spare

    def spare_until_next_s(self, table: DemandTable, *, now: float, busy_s: float = 0.0) -> float:
        """Seconds between the next token of those that may end with it and when it must be out.

        The least of them, all prompts read before; infinite if there are none.

        Args:
            table, now, busy_s: see ``spare_s``.
        """
        next_s = now + busy_s + self.reading_s + self.first_step_s
        return float(table.next_by_s[self.rows].min(initial=np.inf)) - next_s

    def least_spare_s(self, table: DemandTable, *, now: float, busy_s: float = 0.0) -> float:
        """What the answer with the least time to spare has, as a whole and until its next token.

        Args:
            table, now, busy_s: see ``spare_s``.
        """
        as_a_whole = self.spare_s(table, now=now, busy_s=busy_s).min(initial=np.inf)
        return min(float(as_a_whole), self.spare_until_next_s(table, now=now, busy_s=busy_s))

    def keeps_all(
        self,
        table: DemandTable,
        *,
        now: float,
        busy_s: float = 0.0,
        from_due_s: float = -np.inf,
        **_: float,
    ) -> bool:
        """Whether it keeps every promise: each prompt's due time, each pace, and each end.

        Args:
            table, now, busy_s: see ``spare_s``.
            from_due_s: see ``capacity.pressure``.
        """
        return not self.late(table, now=now, busy_s=busy_s, from_due_s=from_due_s).any()

    def late(
        self, table: DemandTable, *, now: float, busy_s: float = 0.0, from_due_s: float = -np.inf
    ) -> Mask:
        """[n] whose promise it breaks: a prompt's due time, a pace, or an end.

        Args:
            table, now, busy_s: see ``spare_s``.
            from_due_s: see ``capacity.pressure``.
        """
        start_s, prompts = now + busy_s, table.prompts
        late = self.spare_s(table, now=now, busy_s=busy_s) < 0.0
        late[self.rows] |= start_s + self.reading_s + self.first_step_s > table.next_by_s[self.rows]
        read_s = self.first_step_s + _reading_s(table, self.levels, prompts).cumsum()
        due_s = table.due_s[prompts]
        late[prompts] |= (start_s + read_s > due_s) & (due_s >= from_due_s)
        return late


def course(table: DemandTable, levels: Levels) -> Course:
    """What a full batch would do.

    Args:
        table: of live requests.
        levels: [n] where each one is.
    """
    is_prompt = np.zeros(len(levels), dtype=bool)
    is_prompt[table.prompts] = True
    rows = np.flatnonzero(table.decodes | is_prompt)
    rows = rows[table.num_left[rows].argsort(kind="stable")]
    num_steps, level = table.num_left[rows], levels[rows]
    depth = table.layers[level]
    row_s = table.row_s + depth * table.layer_s[rows]
    base_s = table.segment_s.cumsum()[level]
    step_s = np.maximum.accumulate(base_s[::-1])[::-1] + row_s[::-1].cumsum()[::-1]
    # With each step every context that is left is a token longer.
    longer_s = table.context_s * depth[::-1].cumsum()[::-1]
    steps = np.diff(num_steps, prepend=0.0)
    made = num_steps - (steps + 1.0) / 2  # by the middle of them
    reading_s = float(_reading_s(table, levels, rows).sum())
    return Course(
        levels=levels,
        rows=rows,
        num_steps=num_steps,
        over_s=reading_s + (steps * (step_s + made * longer_s)).cumsum(),
        reading_s=reading_s,
        first_step_s=float(step_s[0]) if len(rows) else 0.0,
    )


def _reading_s(table: DemandTable, levels: Levels, rows: Levels) -> Floats:
    """[m] by how much prompts make the steps longer in which they are read; 0 for who decodes."""
    level = levels[rows]
    alone_s = table.work_s[rows] + table.layers[level] * table.work_layer_s[rows]
    more_s: Floats = np.maximum(alone_s - table.segment_s.cumsum()[level], 0.0)
    return more_s


def least_spare_s(
    demands: Sequence[Demand], exits: Sequence[int], costs: StepCosts, now: float
) -> float:
    """What the answer with the least time to spare has, of those who decode.

    Infinite if nobody does. Their exits are among ``exits`` (ascending).
    """
    columns = Columns.of(demands)
    if not columns.is_decoding.all():
        columns = columns.rows(columns.is_decoding)
    table = DemandTable.of(columns, costs, exits)
    return course(table, table.level).least_spare_s(table, now=now)


def least_uniform_lowering(
    table: DemandTable,
    tokens: Floats,
    *,
    limit: float,
    **times: float,
) -> tuple[Levels, float] | None:
    """The least lowering with which a full batch keeps every promise, and what is lost by it.

    A full batch is as deep as its deepest row, so all who may go down to an exit do. None if there
    is no such exit, or if more would be lost than the limit.

    Args:
        table: of live requests.
        tokens: [K] worth of an answer's tokens, by exit, ascending.
        limit: of the loss.
        **times: see ``Course.keeps_all``.
    """
    level = table.level
    weight = table.weight * table.left_share
    for deepest in range(len(table.layers) - 1, -1, -1):
        to = np.minimum(level, np.maximum(table.floor, deepest))
        loss = float(weight @ (tokens[level] - tokens[to]))
        if loss > limit:
            return None
        if course(table, to).keeps_all(table, **times):
            return to, loss
    return None
