"""``fair``: every depth gets the same compute time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sortserve.scheduling.policy import LEAST_STEP_S, DepthClass, Policy

__all__ = ["FAIR", "fair", "fair_rates"]


def fair(classes: Sequence[DepthClass]) -> int:
    """Each depth gets the same compute time: the class that has had least sets the cap.

    Stride scheduling (Waldspurger and Weihl, 1995) with the depth's cost as the stride. A class at
    cost c gets tokens at a rate proportional to 1 / c; with k classes none is slowed by more than
    k against running alone. At equal service the deepest goes first, since all others ride along.
    """
    return min(classes, key=lambda c: (c.service, -c.exit_layer)).exit_layer


def fair_rates(costs: Mapping[int, float]) -> dict[int, float]:
    """While the deepest exit takes one step, exit e takes cost(deepest) / cost(e).

    Those beyond the next deeper exit's have their cap at e.
    """
    costs = {e: max(seconds, LEAST_STEP_S) for e, seconds in costs.items()}
    exits = sorted(costs, reverse=True)
    deepest = costs[exits[0]]
    shares = {e: deepest / min(costs[e], deepest) for e in exits}
    period, previous = 0.0, 0.0
    for e in exits:
        period += max(0.0, shares[e] - previous) * costs[e]
        previous = max(previous, shares[e])
    return {e: shares[e] / period for e in exits}


FAIR = Policy(name="fair", about="gives every depth the same time", cap=fair, rates=fair_rates)
