"""Run a plan so that a failure stays with the row that caused it (no torch)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sortserve.core.plan import RowPlan, Runner, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken

__all__ = ["Execution", "execute", "outcome"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What became of a plan."""

    plan: StepPlan
    """The plan with the rows that ran alone."""
    tokens: tuple[SampledToken, ...] = ()
    """One for each of these rows that samples, in the plan's order."""
    failures: dict[str, RowFailure] = field(default_factory=dict)
    """Why the others did not, by request."""
    was_retried: bool = False
    """It ran again, row by row unless it had failed under way, after it had failed as a whole."""


def execute(
    runner: Runner, plan: StepPlan, *, on_start: Callable[[], None] = lambda: None
) -> Execution:
    """Run a plan; where it fails as a whole, run its rows one by one.

    Running a row again writes the same keys and values to the same pages, and a row alone gives
    the token that it gives among others, so the innocent rows lose time and nothing else.

    Args:
        runner: executes plans.
        plan: what to run.
        on_start: called before each call of the runner.
    """
    try:
        return _run(runner, plan, on_start)
    except Exception as error:
        if len(plan.rows) == 1:
            return _failed(plan, error)
        logger.warning(
            "a step of %d rows failed (%s): its rows are run one by one",
            len(plan.rows),
            type(error).__name__,
        )
    parts = [_run_alone(runner, row, on_start) for row in plan.rows]
    return Execution(
        plan=replace(plan, rows=tuple(row for part in parts for row in part.plan.rows)),
        tokens=tuple(token for part in parts for token in part.tokens),
        failures={id_: failure for part in parts for id_, failure in part.failures.items()},
        was_retried=True,
    )


def _run_alone(runner: Runner, row: RowPlan, on_start: Callable[[], None]) -> Execution:
    plan = StepPlan(rows=(row,), depth_cap=row.exit_layer)
    try:
        return _run(runner, plan, on_start)
    except Exception as error:
        return _failed(plan, error)


def _run(runner: Runner, plan: StepPlan, on_start: Callable[[], None]) -> Execution:
    on_start()
    return outcome(plan, runner.execute(plan))


def outcome(plan: StepPlan, results: Sequence[SampledToken | RowFailure]) -> Execution:
    """What became of a plan that ran as a whole.

    Args:
        plan: what ran.
        results: what the runner gave.
    """
    sampling = [row for row in plan.rows if row.sampling is not None]
    assert len(results) == len(sampling), f"{len(results)} results for {len(sampling)} rows"
    tokens = tuple(result for result in results if not isinstance(result, RowFailure))
    if len(tokens) == len(results):
        return Execution(plan=plan, tokens=tokens)
    failures = {
        row.request_id: result
        for row, result in zip(sampling, results, strict=True)
        if isinstance(result, RowFailure)
    }
    plan = replace(plan, rows=tuple(r for r in plan.rows if r.request_id not in failures))
    return Execution(plan=plan, tokens=tokens, failures=failures)


def _failed(plan: StepPlan, error: Exception) -> Execution:
    """The execution of a plan of one row that raised."""
    [row] = plan.rows
    logger.error("the model failed on request %s", row.request_id, exc_info=error)
    failure = RowFailure("exception", type(error).__name__)
    return Execution(plan=replace(plan, rows=()), failures={row.request_id: failure})
