"""``lockstep``: everybody runs every step. The baseline that shows the trap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sortserve.scheduling.policy import LEAST_STEP_S, DepthClass, Policy

__all__ = ["LOCKSTEP", "lockstep", "lockstep_rates"]


def lockstep(classes: Sequence[DepthClass]) -> int:
    """As deep as the deepest."""
    return max(c.exit_layer for c in classes)


def lockstep_rates(costs: Mapping[int, float]) -> dict[int, float]:
    """Every exit takes part in every step, and each is one to the deepest busy exit."""
    return dict.fromkeys(costs, 1.0 / max(costs[max(costs)], LEAST_STEP_S))


LOCKSTEP = Policy(name="lockstep", about="is the baseline", cap=lockstep, rates=lockstep_rates)
