"""How deep requests without a budget may start: less under overload, with hysteresis (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DepthLevel", "next_level"]

HOLD_S = 0.5
"""A level lasts at least so long before the next one down."""
CALM_S = 3.0
"""The queue must be short for so long before the next one up."""
CALM_SHARE = 0.5
"""Short is below this share of the delay that counts as overload."""


@dataclass(frozen=True)
class DepthLevel:
    """The deepest exit for unbudgeted newcomers, and since when the queue has been as it is."""

    num_down: int = 0
    """Exits below the full depth."""
    changed_s: float = float("-inf")
    calm_since_s: float | None = None

    def exit_layer(self, exits: Sequence[int]) -> int:
        """The deepest exit allowed."""
        return exits[max(0, len(exits) - 1 - self.num_down)]


def next_level(
    level: DepthLevel, *, queue_delay_s: float, limit_s: float, num_exits: int, now: float
) -> DepthLevel:
    """The level after a look at the queue.

    Args:
        level: the present one.
        queue_delay_s: predicted seconds until a newcomer's prompt would be read.
        limit_s: the delay that counts as overload; 0 switches the whole thing off.
        num_exits: how many there are.
        now: the engine's clock.
    """
    if limit_s <= 0.0:
        return DepthLevel()
    if queue_delay_s > limit_s:
        if level.num_down < num_exits - 1 and now - level.changed_s >= HOLD_S:
            return DepthLevel(level.num_down + 1, now, None)
        return DepthLevel(level.num_down, level.changed_s, None)
    if level.num_down == 0 or queue_delay_s > CALM_SHARE * limit_s:
        return DepthLevel(level.num_down, level.changed_s, None)
    calm_since_s = now if level.calm_since_s is None else level.calm_since_s
    if now - calm_since_s >= CALM_S:
        return DepthLevel(level.num_down - 1, now, now)
    return DepthLevel(level.num_down, level.changed_s, calm_since_s)
