"""Promises that are at risk already, and who may come in beside them (no torch, no clock).

Where a machine becomes slower, some answer that left little to spare cannot be kept by either
course any more, as far as the forecast can say. It runs before all others while it lives, so who
comes then waits for it, and takes nothing from it. To refuse everybody meanwhile would give up
those who have the time to wait. So a newcomer is let in if its own promise and all others are kept
by a full batch in which it begins once those at risk are over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.demand_table import DemandTable
from sortserve.scheduling.full_batch import Course, course
from sortserve.scheduling.lowering import MAX_PRESSURE, Times

__all__ = ["AtRisk"]


@dataclass(frozen=True)
class AtRisk:
    """What is left to keep beside promises that are at risk."""

    table: DemandTable
    """All live requests, those at risk without times to keep."""
    num_steps: int
    """Until the last of those is over."""
    over_s: float
    """Seconds until then, if each step runs everybody."""

    @classmethod
    def of(cls, table: DemandTable, found: Course, paced: Times, full: Times) -> AtRisk | None:
        """None if all promises can be kept by one course, or by pacing once others go shallower.

        Args:
            table: of all live requests.
            found: their full batch.
            paced: when pacing begins.
            full: when a full batch begins.
        """
        late = found.late(table, now=full["now"], busy_s=full["busy_s"])
        if not late.any() or table.need(table.level, **paced).share <= MAX_PRESSURE:
            return None
        floors = np.minimum(table.level, table.floor)
        if table.need(floors, **paced).share <= MAX_PRESSURE:
            return None
        is_last = late[found.rows]
        num_steps = found.num_steps[is_last].max()
        waits = (table.work_s > 0.0) & ~late  # for its prompt, as the newcomer will
        due_s = np.where(late, np.inf, table.due_s)
        untimed = replace(
            table,
            end_s=np.where(late, np.inf, table.end_s),
            next_by_s=np.where(late, np.inf, table.next_by_s),
            due_s=due_s,
            num_left=np.where(waits, table.num_left + num_steps, table.num_left),
            prompts=table.prompts[due_s[table.prompts].argsort(kind="stable")],
        )
        return cls(
            table=untimed,
            num_steps=int(num_steps),
            over_s=float(found.over_s[is_last].max()),
        )

    def keeps_others_and(self, demand: Demand, costs: StepCosts, full: Times) -> bool:
        """Whether a newcomer's promise and all that are not at risk can be kept.

        Args:
            demand: the newcomer's.
            costs: of the table.
            full: when a full batch begins.
        """
        begins_later = replace(
            demand, num_left=demand.num_left + self.num_steps, due_s=demand.due_s - self.over_s
        )
        table = self.table.plus_one(begins_later, costs)
        return course(table, table.level).keeps_all(table, **full)
