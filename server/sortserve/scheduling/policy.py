"""How deep a step goes: pure functions of plain values, chosen by name.

In lock-step a row that exits at layer 9 waits for the rows that run to 30 before it can start its
next token, so depth saves arithmetic and gains no latency. A step therefore has a *depth cap*: rows
of deeper exits sit it out, rows at or below it run (design 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sortserve.errors import ConfigError

__all__ = ["POLICIES", "DepthClass", "Policy", "fair", "get_policy", "lockstep", "mean_step_rates"]


@dataclass(frozen=True)
class DepthClass:
    """The rows of one exit that have work."""

    exit_layer: int
    num_rows: int
    cost: float
    """Relative cost of one step to this depth (the exit's share of the full model's FLOPs)."""
    service: float
    """Cost of the steps this class has had a part in, since it became busy."""


Policy = Callable[[Sequence[DepthClass]], int]


def lockstep(classes: Sequence[DepthClass]) -> int:
    """Everybody runs every step, as deep as the deepest. The baseline that shows the trap."""
    return max(c.exit_layer for c in classes)


def fair(classes: Sequence[DepthClass]) -> int:
    """Each depth gets the same compute time: the class that has had least sets the cap.

    Stride scheduling (Waldspurger and Weihl, 1995) with the depth's cost as the stride. A class at
    cost c gets tokens at a rate proportional to 1 / c; with k classes none is slowed by more than
    k against running alone. At equal service the deepest goes first, since all others ride along.
    """
    return min(classes, key=lambda c: (c.service, -c.exit_layer)).exit_layer


POLICIES: dict[str, Policy] = {"lockstep": lockstep, "fair": fair}


def get_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(
            f"policy={name!r} is not known: choose one of {', '.join(sorted(POLICIES))}.",
            param="policy",
        )
    return POLICIES[name]


def mean_step_rates(policy: str, costs: dict[int, float]) -> dict[int, float]:
    """Steps per second that each busy exit takes part in, under a policy.

    Args:
        policy: its name.
        costs: seconds of a step with the depth cap at each busy exit.

    ``lockstep``: one per deepest step. ``fair``: while the deepest exit takes one step, exit e
    takes cost(deepest) / cost(e); those beyond the next deeper exit's have their cap at e.
    """
    exits = sorted(costs, reverse=True)
    deepest = costs[exits[0]]
    if policy == "lockstep":
        return dict.fromkeys(exits, 1.0 / deepest)
    shares = {e: deepest / min(costs[e], deepest) for e in exits}
    period, previous = 0.0, 0.0
    for e in exits:
        period += max(0.0, shares[e] - previous) * costs[e]
        previous = max(previous, shares[e])
    return {e: shares[e] / period for e in exits}
