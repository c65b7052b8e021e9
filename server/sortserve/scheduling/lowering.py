"""Who goes shallower so that every promise can be kept, at the least loss (no torch).

What a token is worth at each exit is the objective's to say. A move takes a request to a shallower
exit. It loses the worth of its remaining tokens there, and gains the share of the machine that it
needs less. Moves do not add up: a step costs its depth once, however many rows ride along, so most
of the gain comes with the last row that leaves a depth. So moves are made in groups. For each exit,
the requests below it are put in order of the loss per share of the machine they ask for, and every
beginning of that order is a group. Of the groups that gain enough the one that loses least is
moved, else the one that loses least per gain, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Required, TypedDict

import numpy as np

from sortserve.scheduling.columns import Floats
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.demand_table import DemandTable, Levels, Need
from sortserve.scheduling.full_batch import course, least_uniform_lowering
from sortserve.scheduling.objective import Worth
from sortserve.scheduling.policy import Lowering

__all__ = ["MAX_PRESSURE", "Times", "least_lowering", "lower"]

MAX_PRESSURE = 1.0
"""The whole of the machine."""
HORIZON_STEPS = 64
"""In flight no prompt counts as due sooner than after so many of the deepest steps. Before that the
order of the rows decides, and a prompt that is late would have everybody go shallower in vain."""
MAX_GROUPS = 6
"""Groups moved at most, each the best after those before it."""
LEAST_GAIN = 1e-4
LEAST_LOSS = 1e-9
"""A loss counts as at least this, so that gains that cost nothing have an order too."""


class Times(TypedDict, total=False):
    """The arguments of ``DemandTable.need`` that do not change while exits are tried."""

    now: Required[float]
    busy_s: float
    from_due_s: float
    least_time_s: float


def lower(
    demands: Sequence[Demand],
    exits: Sequence[int],
    costs: StepCosts,
    now: float,
    worth: Worth,
) -> list[Lowering]:
    """Which requests go shallower in flight, and to which exit.

    Nobody does as long as the promises can be kept, by pacing or by a full batch. Where they
    cannot, giving up a promise is weighed against lowering others for it: one that is given up here
    is not touched, and only no longer reckoned with.

    Args:
        demands: of all live requests.
        exits: all exits, ascending.
        costs: of steps.
        now: the engine's clock.
        worth: what the objective says.
    """
    table = DemandTable.of(demands, costs, exits)
    times = Times(now=now, least_time_s=HORIZON_STEPS * costs.base_s(exits[-1]))
    if table.need(table.level, **times).share <= MAX_PRESSURE:
        return []
    careful = DemandTable.of(demands, replace(costs, safety=costs.model.safety), exits)
    if course(careful, careful.level).keeps_all(careful, now=now):
        return []
    tokens = np.array([worth.tokens[e] for e in exits])
    answer = np.array([worth.answer[e] for e in exits])
    levels, loss = _paced(table, tokens, answer, times)
    if loss > 0.0:
        uniform = least_uniform_lowering(careful, tokens, limit=loss, now=now)
        levels = levels if uniform is None else uniform[0]
    moved = np.flatnonzero(levels != table.level)
    return [(demands[int(i)].request_id, exits[int(levels[i])]) for i in moved]


def _paced(
    table: DemandTable, tokens: Floats, answer: Floats, times: Times
) -> tuple[Levels, float]:
    """Where everybody would be so that paces can be kept, and what is lost by that."""
    levels, loss = table.level, 0.0
    for _ in range(MAX_GROUPS):
        need = table.need(levels, **times)
        group = None
        if need.share > MAX_PRESSURE:
            group = _cheapest(
                [*_ways_down(table, levels, tokens, need), *_ways_out(table, levels, answer, need)]
            )
        if group is None:
            break
        table, levels = group.apply(table, levels)
        loss += group.loss
    return levels, loss


def least_lowering(
    table: DemandTable, tokens: Floats, times: Times, *, limit: float
) -> float | None:
    """What is lost by the lowering found to lose least with which all promises can be kept.

    None if there is none.

    Args:
        table: of all live requests.
        tokens: [K] worth of an answer's tokens, by exit, ascending.
        times: see ``DemandTable.need``.
        limit: it may lose so much at most.
    """
    levels, loss = table.level, 0.0
    for turn in range(MAX_GROUPS):
        need = table.need(levels, **times)
        if need.share <= MAX_PRESSURE:
            return loss
        if turn == 0 and _costs_more(table, tokens, need, limit):
            return None
        if turn == 0 and table.need(np.minimum(levels, table.floor), **times).share > MAX_PRESSURE:
            return None
        group = _cheapest(_ways_down(table, levels, tokens, need))
        if group is None or loss + group.loss > limit:
            return None
        table, levels = group.apply(table, levels)
        loss += group.loss
    return loss if table.need(levels, **times).share <= MAX_PRESSURE else None


def _costs_more(table: DemandTable, tokens: Floats, need: Need, limit: float) -> bool:
    """Whether any lowering that is enough must lose more than the limit.

    It is a bound, cheap beside the search: as if each row that leaves a depth freed its share of
    the steps to there by itself, and could be moved in parts.
    """
    rate, (_, reading) = _asks(table, need)
    bases = np.cumsum(table.segment_s)
    levels, ks = table.level[:, None], np.arange(len(table.layers))
    to = np.minimum(levels, np.maximum(table.floor[:, None], ks))
    fewer = table.layers[levels] - table.layers[to]
    gains = fewer * (rate * table.layer_s + reading)[:, None]
    gains += rate[:, None] * (bases[levels] - bases[to])
    losses = (table.weight * table.left_share)[:, None] * (tokens[levels] - tokens[to])
    prices = np.where(gains > 0.0, losses / np.maximum(gains, LEAST_LOSS), np.inf).min(axis=1)
    most = gains.max(axis=1)
    order = prices.argsort()
    gained = np.minimum(most[order].cumsum(), need.share - MAX_PRESSURE)
    parts = np.diff(gained, prepend=0.0)
    paid = np.where(parts > 0.0, prices[order], 0.0) @ parts
    return bool(paid > limit + LEAST_LOSS)


# ---- groups ----


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows that move together."""

    rows: Levels
    to: Levels | None
    """[n] where each goes; None: it is given up."""
    loss: float
    price: float
    """Loss per share of the machine gained; 0 if the group alone gains enough."""

    def apply(self, table: DemandTable, levels: Levels) -> tuple[DemandTable, Levels]:
        """The demands without those that are given up, and where the others are then."""
        if self.to is None:
            return table.without(self.rows), levels
        moved = levels.copy()
        moved[self.rows] = self.to[self.rows]
        return table, moved


def _cheapest(groups: Iterable[_Group]) -> _Group | None:
    """The least loss of those that gain enough, else the least loss per gain."""
    return min(groups, key=lambda g: (g.price, g.loss), default=None)


def _ways_down(table: DemandTable, levels: Levels, tokens: Floats, need: Need) -> Iterator[_Group]:
    """For each exit the best group to go down to it."""
    rate, (_, reading) = _asks(table, need)
    bases = np.cumsum(table.segment_s)
    for target in range(int(table.floor.min()), len(table.layers) - 1):
        to = np.minimum(levels, np.maximum(table.floor, target))
        rows = np.flatnonzero((to < levels) & ((rate > 0.0) | (reading > 0.0)))
        if len(rows):
            fewer = table.layers[levels] - table.layers[to]
            gains = fewer * (rate * table.layer_s + reading)
            base = rate * (bases[levels] - bases[to])
            losses = table.weight * table.left_share * (tokens[levels] - tokens[to])
            yield from _best_beginning(table, levels, to, rate, rows, gains, base, losses, need)


def _ways_out(table: DemandTable, levels: Levels, answer: Floats, need: Need) -> Iterator[_Group]:
    """The best group of promises to give up."""
    rate, (at_all, reading) = _asks(table, need)
    rows = np.flatnonzero(table.promised & ((rate > 0.0) | (at_all > 0.0)))
    if len(rows):
        depth = table.layers[levels]
        gains = rate * (table.row_s + depth * table.layer_s) + at_all + depth * reading
        base = rate * np.cumsum(table.segment_s)[levels]
        losses = table.weight * answer[levels]
        yield from _best_beginning(table, levels, None, rate, rows, gains, base, losses, need)


def _best_beginning(
    table: DemandTable,
    levels: Levels,
    to: Levels | None,
    rate: Floats,
    rows: Levels,
    gains: Floats,
    base: Floats,
    losses: Floats,
    need: Need,
) -> Iterator[_Group]:
    """Of all beginnings of the rows, cheapest first, the one to move; none if nothing helps.

    Args:
        table: all demands.
        levels: where they are.
        to: where they would go.
        rate: [n] tokens a second that count in the worst moment.
        rows: that can go.
        gains: [n] the share of the machine that each needs less by itself.
        base: [n] the share of the steps' depth that each asks for, were it alone.
        losses: [n] worth.
        need: in the worst moment.
    """
    order = rows[np.argsort(losses[rows] / np.maximum((gains + base)[rows], LEAST_GAIN))]
    gained = np.cumsum(gains[order]) + _base_gains(table, levels, to, rate, order)
    lost = np.cumsum(losses[order])
    enough = np.flatnonzero(gained >= need.share - MAX_PRESSURE)
    if len(enough):
        last, price = int(enough[0]), 0.0
    else:
        helps = gained > LEAST_GAIN
        prices = np.where(
            helps, np.maximum(lost, LEAST_LOSS) / np.maximum(gained, LEAST_GAIN), np.inf
        )
        last = int(prices.argmin())
        price = float(prices[last])
        if not np.isfinite(price):
            return
    yield _Group(order[: last + 1], to, float(lost[last]), price)


def _asks(table: DemandTable, need: Need) -> tuple[Floats, tuple[Floats, Floats]]:
    """What counts in the worst moment: [n] tokens a second, and shares for prompts, as a line."""
    prompts = table.prompts
    decodes = table.decodes.copy()
    decodes[prompts[: need.num_prompts]] = True
    at_all, per_layer = np.zeros_like(table.rate), np.zeros_like(table.rate)
    if np.isfinite(need.until_s):
        read = prompts[: need.num_prompts + 1]
        at_all[read] = table.work_s[read] / need.until_s
        per_layer[read] = table.work_layer_s[read] / need.until_s
    return np.where(decodes, table.rate, 0.0), (at_all, per_layer)


def _base_gains(
    table: DemandTable, levels: Levels, to: Levels | None, rate: Floats, order: Levels
) -> Floats:
    """What steps cost less by their depth, once the first 1, 2, ... of an order have gone.

    Args:
        table: all demands.
        levels: where they are.
        to: where those in the order go; None: away.
        rate: their tokens a second in the worst moment.
        order: of rows, each once.
    """
    ks = np.arange(len(table.layers))
    reach = np.where(levels[:, None] >= ks, rate[:, None], 0.0)
    others = np.ones(len(levels), dtype=bool)
    others[order] = False
    resting = reach[others].max(axis=0, initial=0.0)
    staying = np.vstack((reach[order][1:], resting))
    staying = np.maximum.accumulate(staying[::-1])[::-1]  # of those that have not gone yet
    after = staying
    if to is not None:
        gone = np.where(to[order, None] >= ks, rate[order, None], 0.0)
        after = np.maximum(staying, np.maximum.accumulate(gone))
    before = np.maximum(resting, reach[order].max(axis=0, initial=0.0))
    gains: Floats = (before - after) @ table.segment_s
    return gains
