"""Whom overload may make shallower, and by how much, with hysteresis (no torch).

Nobody loses depth unasked. A request may be made shallower for the sake of others if it bounds a
time, if it names a floor (``min_quality``, ``min_exit_layer``: down to it is fine), or if the
server was told that it may (``--overload-degrade``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sortserve.core.request import Request

__all__ = ["DepthLevel", "floor_in_flight", "may_start_shallower", "next_level"]

HOLD_S = 0.5
"""A level lasts at least so long before the next one down."""
CALM_S = 3.0
"""The queue must be short for so long before the next one up."""
LONG_S = 1e6
"""No silence counts as longer."""
CALM_SHARE = 0.5
"""Short is below this share of the delay that counts as overload."""


def may_start_shallower(request: Request, *, overload_degrade: bool) -> bool:
    """Whether a long queue may choose its exit: never where a time or the exit itself is named."""
    budget = request.budget
    if budget.has_latency or budget.fixes_depth:
        return False
    return overload_degrade or budget.names_floor


def floor_in_flight(
    request: Request,
    exit_layer: int,
    allowed: Sequence[int],
    *,
    exits: Sequence[int],
    overload_degrade: bool,
) -> int:
    """How shallow a request may become once it is in.

    One of several answers to one HTTP request, and one whose client wants it repeatable (``seed``),
    stay as they start, unless a time must be kept.

    Args:
        request: validated.
        exit_layer: where it starts.
        allowed: the exits its budget allows, ascending.
        exits: all exits, ascending. Where one of them is not allowed (it was measured worse than a
            shallower one) nobody goes through it.
        overload_degrade: whether those without a budget may be made shallower.
    """
    below = itertools.takewhile(
        allowed.__contains__, reversed([e for e in exits if e <= exit_layer])
    )
    floor_layer = min(below, default=exit_layer)
    if request.budget.has_latency:
        return floor_layer
    if request.is_one_of_several or request.sampling.seed is not None:
        return exit_layer
    may = may_start_shallower(request, overload_degrade=overload_degrade)
    return floor_layer if may else exit_layer


@dataclass(frozen=True)
class DepthLevel:
    """How many exits overload takes off, and since when the queue has been as it is."""

    num_down: int = 0
    """Exits below the full depth."""
    changed_s: float = float("-inf")
    calm_since_s: float | None = None
    short_from_s: float = float("-inf")
    """When the queue would be short by itself, as of the last look: nobody has come since."""

    def up_to(self, allowed: tuple[int, ...], exits: Sequence[int]) -> tuple[int, ...]:
        """The allowed exits that overload leaves of all to requests that it may make shallower."""
        deepest = exits[max(0, len(exits) - 1 - self.num_down)]
        return tuple(e for e in allowed if e <= deepest) or allowed[:1]


def next_level(
    level: DepthLevel, *, queue_delay_s: float, limit_s: float, num_exits: int, now: float
) -> DepthLevel:
    """The level after a look at the queue; while it is down, every newcomer looks.

    Args:
        level: the present one.
        queue_delay_s: predicted seconds until a newcomer's prompt would be read.
        limit_s: the delay that counts as overload; 0 switches the whole thing off.
        num_exits: how many there are.
        now: the engine's clock.
    """
    if limit_s <= 0.0:
        return DepthLevel()
    short_from_s = now + max(0.0, queue_delay_s - CALM_SHARE * limit_s)
    if queue_delay_s > limit_s:
        if level.num_down < num_exits - 1 and now - level.changed_s >= HOLD_S:
            return DepthLevel(level.num_down + 1, now, None, short_from_s)
        return DepthLevel(level.num_down, level.changed_s, None, short_from_s)
    if level.num_down == 0 or queue_delay_s > CALM_SHARE * limit_s:
        return DepthLevel(level.num_down, level.changed_s, None, short_from_s)
    # Between two newcomers the queue only gets shorter: it has been calm since it was to be.
    calm_since_s = level.calm_since_s
    if calm_since_s is None:
        calm_since_s = min(now, level.short_from_s)
    if now - calm_since_s >= CALM_S:
        num_up = min(level.num_down, int(min(now - calm_since_s, LONG_S) / CALM_S))
        return DepthLevel(level.num_down - num_up, now, now, short_from_s)
    return DepthLevel(level.num_down, level.changed_s, calm_since_s, short_from_s)
