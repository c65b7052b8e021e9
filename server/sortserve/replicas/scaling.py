"""How many replicas there should be: pure, from what they report (no torch, no Ray)."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["MISSED_SHARE", "TARGET_PRESSURE", "wanted_replicas"]

TARGET_PRESSURE = 0.7
"""Share of its machine that a replica's live promises should need: beyond it, newcomers are sent
shallower or refused before another replica has loaded."""
LOW_PRESSURE = 0.5
"""What the others' pressure must stay below when one of them goes; apart from the target, so that
the number does not swing."""
MISSED_SHARE = 0.05
"""Share of the budgets of late that may be missed or refused before another replica comes."""


def wanted_replicas(
    current: int, pressures: Sequence[float], missed_shares: Sequence[float]
) -> int:
    """How many replicas the load of late calls for; at least one.

    Args:
        current: how many there are.
        pressures: of each that has reported: the share of its machine that live promises need.
        missed_shares: of each: budgets missed or refused, of those that ended lately; in [0, 1].
    """
    if not pressures:
        return max(1, current)
    load = sum(pressures) / len(pressures) * current
    wanted = math.ceil(load / TARGET_PRESSURE)
    if wanted > current:
        return wanted
    missed = sum(missed_shares) / max(1, len(missed_shares))
    if missed > MISSED_SHARE:
        return current + 1
    fewer = max(1, math.ceil(load / LOW_PRESSURE))
    return min(current, fewer)
