"""Which exit a request gets, and whether it gets in (no torch, no clock)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sortserve.budget import Budget, OnMiss
from sortserve.errors import BudgetUnattainableError
from sortserve.outputs import Estimate

__all__ = ["ExitChoice", "choose_exit", "fits"]


@dataclass(frozen=True)
class ExitChoice:
    """The exit a request starts at."""

    exit_layer: int
    estimate: Estimate | None
    fits: bool
    """Whether the estimate keeps the budget; always true of a budget that bounds no time."""


def fits(budget: Budget, estimate: Estimate) -> bool:
    """Whether the predicted times keep every bound of the budget."""
    pairs = (
        (estimate.ttft_s, budget.ttft_ms),
        (estimate.tpot_s, budget.tpot_ms),
        (estimate.e2e_s, budget.latency_ms),
    )
    return all(limit is None or seconds * 1e3 <= limit for seconds, limit in pairs)


def choose_exit(
    budget: Budget,
    allowed: Sequence[int],
    predict: Callable[[int], Estimate | None],
) -> ExitChoice:
    """The deepest allowed exit whose predicted times fit: slack is best spent on depth.

    Args:
        budget: what the request may cost.
        allowed: exits that keep its other bounds, ascending, at least one.
        predict: an exit's present estimate; None where nothing was calibrated.

    Raises:
        BudgetUnattainableError: none fits and the budget says ``on_miss=reject``.
    """
    assert allowed
    for exit_layer in reversed(allowed):
        estimate = predict(exit_layer)
        if estimate is None or fits(budget, estimate):
            return ExitChoice(exit_layer, estimate, fits=True)
    assert estimate is not None
    if budget.on_miss is OnMiss.REJECT:
        raise _unattainable(budget, allowed[0], estimate)
    return ExitChoice(allowed[0], estimate, fits=False)


def _unattainable(budget: Budget, shallowest: int, estimate: Estimate) -> BudgetUnattainableError:
    misses = [
        (name, limit, seconds * 1e3)
        for name, limit, seconds in (
            ("ttft_ms", budget.ttft_ms, estimate.ttft_s),
            ("tpot_ms", budget.tpot_ms, estimate.tpot_s),
            ("latency_ms", budget.latency_ms, estimate.e2e_s),
        )
        if limit is not None and seconds * 1e3 > limit
    ]
    name, limit, needed = misses[-1]
    # The excess is mostly queueing that will have drained by then.
    retry_after_s = max(1.0, (needed - limit) / 1e3)
    return BudgetUnattainableError(
        f"No allowed exit fits budget.{name}={limit:g}: the shallowest, exit {shallowest}, needs "
        f"{needed:.0f} ms now. Raise {name}, lower max_tokens, or allow on_miss=degrade.",
        param=f"budget.{name}",
        retry_after_s=retry_after_s,
    )
