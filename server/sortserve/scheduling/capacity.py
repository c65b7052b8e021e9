"""How much of the machine the live promises need: one number, and what lowers it (no torch).

A row with a gap of g seconds needs 1 / g steps a second that reach its exit. Steps nest: one to
layer 30 also serves exit 9. So with R(e) the largest rate of any row at exit e or deeper,

    decode = sum over exits e of (R(e) - R(next deeper)) * base(e) + sum over rows of row / gap

and 1 would be the whole time. Prompts come on top. In the order in which they are due, all up to
each one must fit the time until it is due, beside the rows that decode by then:

    pressure = max(decode, over prompts i: decode before i + work up to i / time until i is due)

Every promise can be kept, in the mean, as long as the pressure is at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sortserve.scheduling.demand import NO_GAP_S, Demand, StepCosts

__all__ = ["Lowering", "lower", "pressure", "shallowest"]

MAX_PRESSURE = 1.0
"""The whole of the machine: requests go shallower in flight when the promises need more."""
LEAST_TIME_S = 1e-3
"""A prompt that is late counts as due in so many seconds."""
MAX_LOWERED = 8
"""Requests lowered in one step at most: each costs a look at all others."""
LEAST_GAIN = 1e-4

Lowering = tuple[str, int]
"""A request and the exit it goes on at."""


class _DecodeLoad:
    """The share of the time that decoding takes, row by row."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._rates: dict[int, float] = {}
        self._rows = 0.0

    def add(self, demand: Demand) -> None:
        rate, exit_layer = 1.0 / max(demand.gap_s, NO_GAP_S), demand.exit_layer
        self._rates[exit_layer] = max(self._rates.get(exit_layer, 0.0), rate)
        context_len = demand.context_len + demand.num_pending
        self._rows += rate * self._costs.row_s(exit_layer, context_len)

    @property
    def share(self) -> float:
        total, deeper = self._rows, 0.0
        for exit_layer in sorted(self._rates, reverse=True):
            rate = max(self._rates[exit_layer], deeper)
            total += (rate - deeper) * self._costs.base_s(exit_layer)
            deeper = rate
        return total


def pressure(
    demands: Iterable[Demand],
    costs: StepCosts,
    *,
    now: float,
    busy_s: float = 0.0,
    from_due_s: float = -math.inf,
) -> float:
    """The share of the machine that these demands need; above 1 some promise will be broken.

    Args:
        demands: of all live requests.
        costs: of steps.
        now: the engine's clock.
        busy_s: what the step under way still takes.
        from_due_s: prompts that are due before are taken to be in time: one that is due later waits
            for them, and changes nothing for them.
    """
    load = _DecodeLoad(costs)
    prompts = []
    for demand in demands:
        if demand.is_decoding:
            load.add(demand)
        elif demand.is_hard:
            prompts.append(demand)
        elif demand.is_promised:
            load.add(demand)  # only its tokens are due, and they may begin at any time
    worst, work_s = load.share, 0.0
    for demand in sorted(prompts, key=lambda d: d.due_s):
        work_s += demand.work_s(costs)
        time_s = max(demand.due_s - now - busy_s, LEAST_TIME_S)
        if demand.due_s >= from_due_s:
            worst = max(worst, load.share + work_s / time_s)
        load.add(demand)
    return max(worst, load.share)


def shallowest(demands: Iterable[Demand]) -> list[Demand]:
    """The demands with every request at its floor: the most that going shallower can give."""
    return [replace(demand, exit_layer=demand.floor_layer) for demand in demands]


def lower(
    demands: Sequence[Demand],
    exits: Sequence[int],
    costs: StepCosts,
    now: float,
    *,
    limit: float = MAX_PRESSURE,
) -> list[Lowering]:
    """Which requests must go shallower for the promises to be kept, and to which exit.

    Soft requests first, a depth at a time; then, one by one, the promised request that asks most of
    the machine, by one exit. A move that helps nothing is not made, and none goes below its floor.

    Args:
        demands: of all live requests.
        exits: all exits, ascending.
        costs: of steps.
        now: the engine's clock.
        limit: the pressure to come down to.
    """
    current = {demand.request_id: demand for demand in demands}
    before = pressure(current.values(), costs, now=now)
    lowered: dict[str, int] = {}
    tried: set[Lowering] = set()
    while before > limit and len(lowered) < MAX_LOWERED:
        group = _next_group(current.values(), exits, costs, tried, now)
        if not group:
            break
        moved = {d.request_id: replace(d, exit_layer=_below(d, exits)) for d in group}
        tried |= {(d.request_id, d.exit_layer) for d in group}
        after = pressure({**current, **moved}.values(), costs, now=now)
        if after < before - LEAST_GAIN:
            current |= moved
            lowered |= {id_: d.exit_layer for id_, d in moved.items()}
            before = after
    return list(lowered.items())


def _below(demand: Demand, exits: Sequence[int]) -> int:
    """The next exit that it may go down to; its own if there is none."""
    allowed = [e for e in exits if demand.floor_layer <= e < demand.exit_layer]
    return allowed[-1] if allowed else demand.exit_layer


def _next_group(
    demands: Iterable[Demand],
    exits: Sequence[int],
    costs: StepCosts,
    tried: set[Lowering],
    now: float,
) -> list[Demand]:
    """The next requests to lower together: the deepest soft ones, else one that is promised."""
    movable = [
        d
        for d in demands
        if d.exit_layer > d.floor_layer
        and (d.request_id, d.exit_layer) not in tried
        and _below(d, exits) < d.exit_layer
    ]
    soft = [d for d in movable if not d.is_promised]
    if soft:
        deepest = max(d.exit_layer for d in soft)
        return [d for d in soft if d.exit_layer == deepest]
    if not movable:
        return []
    return [max(movable, key=lambda d: (_share(d, costs, now), d.order))]


def _share(demand: Demand, costs: StepCosts, now: float) -> float:
    """What a promised request asks of the machine by itself."""
    if demand.is_decoding:
        return demand.work_s(costs) / max(demand.gap_s, NO_GAP_S)
    return demand.work_s(costs) / max(demand.due_s - now, LEAST_TIME_S)
