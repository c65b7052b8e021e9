"""Which exit a request gets, and whether it gets in (no torch, no clock)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sortserve.admission.forecast import Forecast
from sortserve.core.budget import Budget, OnMiss
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.request import Estimate
from sortserve.core.schedule import DepthSchedule
from sortserve.core.sequence import Promise
from sortserve.scheduling.objective import Worth

__all__ = ["ExitChoice", "Predict", "ScheduledPlan", "choose_exit", "worth_beside", "worths"]


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
    schedule: DepthSchedule | None = None
    """The measured schedule that its depth follows; None: none but the budget's own."""


class Predict(Protocol):
    """An exit's present forecast."""

    def __call__(self, exit_layer: int, *, limit: float) -> Forecast:
        """The forecast; others may lose ``limit`` for it at most."""


class PredictPlan(Protocol):
    """A plan's present forecast."""

    def __call__(self, *, limit: float) -> Forecast:
        """As ``Predict`` has it."""


@dataclass(frozen=True)
class ScheduledPlan:
    """An answer whose depth falls along a measured schedule."""

    schedule: DepthSchedule
    worth: float
    """Of the answer, beside being refused."""
    predict: PredictPlan

    @property
    def exit_layer(self) -> int:
        """Where it starts."""
        return self.schedule.exits[-1]


def choose_exit(
    budget: Budget,
    allowed: Sequence[int],
    predict: Predict,
    *,
    worth: Mapping[int, float],
    schedules: Iterable[ScheduledPlan] = (),
    drain_s: Callable[[], float | None] = lambda: None,
) -> ExitChoice:
    """The plan that brings most, of those that keep the budget and every promise before it.

    A plan is an exit for the newcomer, or a measured depth schedule, and who of the others goes
    shallower for it. It brings what the newcomer's answer is worth, less what the others lose. If
    no plan brings anything, refusing the newcomer loses least, and ``on_miss`` decides. Of equal
    plans an exit is taken before a schedule, and then the deepest.

    Args:
        budget: what the request may cost.
        allowed: exits that keep its other bounds, ascending, at least one.
        predict: an exit's present forecast.
        worth: of its answer at each of them (see ``worths``).
        schedules: that it may follow instead.
        drain_s: predicted seconds until it would fit; None: never.

    Raises:
        BudgetUnattainableError: none fits and the budget says ``on_miss=reject``.
    """
    assert allowed
    floor = allowed[0]
    most, best, at_floor = 0.0, None, None
    for brings, exit_layer, scheduled in _by_worth(allowed, worth, schedules):
        if best is not None and brings <= most:
            break  # nothing after it brings more
        limit = brings - most
        found = scheduled.predict(limit=limit) if scheduled else predict(exit_layer, limit=limit)
        if scheduled is None and exit_layer == floor:
            at_floor = found
        if found.loss is not None and (best is None or brings - found.loss > most):
            most, best = brings - found.loss, (exit_layer, scheduled, found)
    if best is not None:
        exit_layer, scheduled, found = best
        promise = found.promise if budget.has_latency else None
        schedule = scheduled.schedule if scheduled else None
        return ExitChoice(exit_layer, found.estimate, True, floor, promise, schedule)
    assert at_floor is not None, "all were tried"
    if budget.on_miss is OnMiss.REJECT:
        raise _unattainable(budget, allowed, at_floor.estimate, drain_s())
    return ExitChoice(floor, at_floor.estimate, False, floor)


def _by_worth(
    allowed: Sequence[int], worth: Mapping[int, float], schedules: Iterable[ScheduledPlan]
) -> list[tuple[float, int, ScheduledPlan | None]]:
    """All plans as (worth, first exit, schedule), best first; of equal ones those that come first.

    The early tokens of a schedule take more time than those of an exit that is worth as much.
    """
    exits = [(worth[e], e, None) for e in allowed]
    plans = [*exits, *((plan.worth, plan.exit_layer, plan) for plan in schedules)]
    return sorted(plans, key=lambda p: (-p[0], p[2] is not None, -p[1]))


Mean = Callable[[Callable[[int], float], int], float]
"""The mean over an answer's tokens of what each one's exit is given, if it starts at an exit."""


def _same(value: Callable[[int], float], exit_layer: int) -> float:
    return value(exit_layer)


def worths(
    allowed: Sequence[int],
    worth: Worth,
    weight: float,
    mean: Mean = _same,
) -> dict[int, float]:
    """What an answer is worth at each exit it may start at, beside being refused.

    Args:
        allowed: the exits, ascending.
        worth: what the objective says of them.
        weight: of the request.
        mean: over its tokens.
    """
    worth_of = worth_beside(allowed[-1], worth, weight, mean)
    return {e: worth_of(mean(worth.tokens.__getitem__, e)) for e in allowed}


def worth_beside(
    deepest: int, worth: Worth, weight: float, mean: Mean = _same
) -> Callable[[float], float]:
    """What an answer is worth beside being refused, if all its tokens are worth so much.

    Args:
        deepest: the exit of which a refusal deprives the request.
        worth: what the objective says of it.
        weight: of the request.
        mean: as ``worths`` has it.
    """
    whole, tokens = mean(worth.answer.__getitem__, deepest), mean(worth.tokens.__getitem__, deepest)
    return lambda own: weight * (whole - (tokens - own))


def _unattainable(
    budget: Budget, allowed: Sequence[int], estimate: Estimate, drain_s: float | None
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
        f"{_named(allowed)} needs {needed:.0f} ms now"
        if missed
        else f"exit {allowed[0]} would cost other requests more than it brings"
    )
    return BudgetUnattainableError(
        f"No allowed exit fits budget.{name}={limit:g}: {reason}. "
        f"Raise {name}, lower max_tokens, or allow on_miss=degrade.",
        param=f"budget.{name}",
        retry_after_s=retry_after_s,
    )


def _named(allowed: Sequence[int]) -> str:
    exit_layer = allowed[0]
    return f"exit {exit_layer}" if len(allowed) == 1 else f"the shallowest, exit {exit_layer},"
