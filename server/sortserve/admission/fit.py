"""Whether a newcomer's times fit beside all promises, and what is lost for it (no torch, no clock).

They fit if one of two courses keeps them all: pacing (``capacity``) or the full batch
(``full_batch``). Where neither does, others go shallower for it. And in any case those who come
later may lose by it (``offered``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from sortserve.admission.newcomer import newcomer_demand, spread
from sortserve.admission.outlook import Newcomer, Outlook
from sortserve.core.sequence import Promise
from sortserve.scheduling.demand_table import DemandTable
from sortserve.scheduling.full_batch import Course, course, least_uniform_lowering
from sortserve.scheduling.lowering import MAX_PRESSURE, Times, least_lowering

__all__ = ["room_for"]


def room_for(
    exit_layer: int,
    newcomer: Newcomer,
    promises: Iterable[Promise],
    outlook: Outlook,
    limit: float,
    *,
    present: Outlook,
    enters_now: bool = True,
) -> tuple[Promise | None, float | None]:
    """The promise to give a newcomer, and the worth that others lose by it.

    The first promise that can be kept as things are, else the one that needs least of others. No
    promise if none can be given at all; no loss if others cannot make room within the limit.

    Later requests are charged to who can be refused, and not where it would be the only promise: a
    machine with nothing to do would keep itself free for requests like the one it refuses.

    Args:
        exit_layer: asked about; only the others may move.
        newcomer: who asks.
        promises: that could be given, in the order of trial.
        outlook: the load, those that come with it included.
        limit: the others shall lose no more.
        present: the load without these.
        enters_now: whether there is a slot, and pages, at once: a full batch leaves nobody out.
    """
    now, costs = outlook.load.now, outlook.costs
    is_charged = newcomer.may_be_refused and outlook.load.offered.worth > 0.0 and present.any_ends
    # All end when they end, however the newcomer's time is spread: one course for all promises.
    found: Course | None = None
    later, least, best = 0.0, math.inf, None
    for promise in promises:
        demand = newcomer_demand(exit_layer, newcomer, promise, now=now, may_move=False)
        if demand.is_hard and demand.due_s <= now:  # however fast the machine
            continue
        demand = spread(demand, newcomer, costs)
        table = outlook.table.plus_one(demand, costs)
        if is_charged and found is None:
            found = course(table, table.level)
            later = max(0.0, outlook.later_loss(table, found) - present.loss_so_far)
            if later > limit:
                return promise, None
        paced, full = outlook.pacing, outlook.batching
        paced["from_due_s"] = full["from_due_s"] = demand.due_s
        share = table.need(table.level, **paced).share
        if share <= MAX_PRESSURE:
            return promise, later
        if enters_now:
            found = course(table, table.level) if found is None else found
            if found.keeps_all(table, **full):
                return promise, later
            at_risk = outlook.at_risk if outlook is present else None
            if at_risk is not None and at_risk.keeps_others_and(demand, costs, outlook.batching):
                return promise, later
        if share < least:
            least, best = share, (promise, table, paced, full)
    if best is None:
        return None, None
    promise, table, paced, full = best
    going_down = _least_loss(table, paced, full, outlook, limit - later, enters_now=enters_now)
    return promise, None if going_down is None else going_down + later


def _least_loss(
    table: DemandTable,
    paced: Times,
    full: Times,
    outlook: Outlook,
    limit: float,
    *,
    enters_now: bool,
) -> float | None:
    """What others lose at least by going shallower so that one course keeps all promises."""
    uniform = None
    if enters_now:
        uniform = least_uniform_lowering(table, outlook.worth, limit=limit, **full)
    if uniform is None:
        return least_lowering(table, outlook.worth, paced, limit=limit)
    groups = least_lowering(table, outlook.worth, paced, limit=uniform[1])
    return uniform[1] if groups is None else groups
