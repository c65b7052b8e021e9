"""Which exit a request gets, and whether it gets in (no torch, no clock)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sortserve.admission.forecast import Forecast
from sortserve.core.budget import Budget, OnMiss
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.request import Estimate
from sortserve.core.sequence import Promise

__all__ = ["ExitChoice", "choose_exit"]


@dataclass(frozen=True)
class ExitChoice:
    """The exit a request starts at."""

    exit_layer: int
    estimate: Estimate | None
    fits: bool
    """Whether the budget is promised to be kept; always true of one that bounds no time."""
    floor_layer: int | None = None
    """It may go so shallow in flight; None: it stays."""
    promise: Promise | None = None
    """The times to keep; None: nobody was promised any."""


def choose_exit(
    budget: Budget,
    allowed: Sequence[int],
    predict: Callable[[int], Forecast],
    *,
    drain_s: Callable[[], float | None] = lambda: None,
) -> ExitChoice:
    """The deepest allowed exit that keeps the budget and every promise before it.

    If there is none, the shallowest allowed one, provided that it fits once others have gone
    shallower for it. If it does not fit even then, ``on_miss`` decides.

    Args:
        budget: what the request may cost.
        allowed: exits that keep its other bounds, ascending, at least one.
        predict: an exit's present forecast.
        drain_s: predicted seconds until it would fit; None: never.

    Raises:
        BudgetUnattainableError: none fits and the budget says ``on_miss=reject``.
    """
    assert allowed
    floor = allowed[0]
    for exit_layer in reversed(allowed):
        found = predict(exit_layer)
        if found.keeps:
            promise = found.promise if budget.has_latency else None
            return ExitChoice(exit_layer, found.estimate, True, floor, promise)
    if found.keeps_lowered:
        return ExitChoice(floor, found.estimate, True, floor, found.promise)
    if budget.on_miss is OnMiss.REJECT:
        raise _unattainable(budget, floor, found.estimate, drain_s())
    return ExitChoice(floor, found.estimate, False, floor)


def _unattainable(
    budget: Budget, shallowest: int, estimate: Estimate, drain_s: float | None
) -> BudgetUnattainableError:
    bounds = (
        ("ttft_ms", budget.ttft_ms, estimate.ttft_s),
        ("tpot_ms", budget.tpot_ms, estimate.tpot_s),
        ("latency_ms", budget.latency_ms, estimate.e2e_s),
    )
    given = [(name, limit, seconds * 1e3) for name, limit, seconds in bounds if limit is not None]
    missed = [bound for bound in given if bound[2] > bound[1]]
    name, limit, needed = (missed or given)[-1]
    # The excess is mostly queueing that will have drained by then.
    retry_after_s = max(1.0, (needed - limit) / 1e3 if drain_s is None else drain_s)
    reason = (
        f"the shallowest, exit {shallowest}, needs {needed:.0f} ms now"
        if missed
        else f"exit {shallowest} would break promises made to others"
    )
    return BudgetUnattainableError(
        f"No allowed exit fits budget.{name}={limit:g}: {reason}. "
        f"Raise {name}, lower max_tokens, or allow on_miss=degrade.",
        param=f"budget.{name}",
        retry_after_s=retry_after_s,
    )
