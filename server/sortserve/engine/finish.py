"""How a request ends: the report made from its sequence (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sortserve.core.budget import ExitTable, OnMiss
from sortserve.core.errors import BudgetUnattainableError, EngineError
from sortserve.core.request import FinishReason, Request, RequestReport
from sortserve.core.sampling_params import RowFailure
from sortserve.core.sequence import Sequence

__all__ = ["expired_in_queue", "failure_error", "is_over", "make_report", "would_overrun"]


def make_report(
    sequence: Sequence, reason: FinishReason, *, exits: ExitTable, now: float, promised: bool
) -> RequestReport:
    """The report of a finished sequence; ``promised``: its budget was promised to be kept."""
    report = RequestReport(
        request_id=sequence.request_id,
        budget=sequence.request.budget,
        finish_reason=reason,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_cached_tokens=sequence.num_cached_tokens,
        num_output_tokens=sequence.num_output_tokens,
        exit_layer=sequence.exit_layer,
        tokens_by_exit=dict(sequence.tokens_by_exit),
        compute=_mean(sequence, {info.exit_layer: info.compute for info in exits.exits}),
        predicted=sequence.estimate,
        arrival_s=sequence.request.arrival_s,
        first_scheduled_s=sequence.first_scheduled_s,
        first_token_s=sequence.first_token_s,
        last_token_s=sequence.last_token_s,
        finished_s=now,
        num_preemptions=sequence.num_preemptions,
        expected_tokens=sequence.expected_tokens,
        seed=sequence.seed,
        degraded=_is_degraded(sequence, exits),
        score=_mean(sequence, exits.scores),
        weight=sequence.request.weight,
        exit_changes=tuple(sequence.exit_changes),
        trace=sequence.request.trace,
    )
    return _with_outcome(report, promised)


def _mean(sequence: Sequence, by_exit: Mapping[int, float]) -> float:
    """The mean over the output tokens of what each exit has; without any, that of its exit."""
    if not sequence.tokens_by_exit:
        return by_exit[sequence.exit_layer]
    weighted = sum(by_exit[e] * n for e, n in sequence.tokens_by_exit.items())
    return weighted / sequence.num_output_tokens


def _is_degraded(sequence: Sequence, exits: ExitTable) -> bool:
    """Whether it was the server's choice that a token is shallower than the budget allows."""
    schedule = sequence.request.budget.schedule
    if schedule is not None:
        return sequence.tokens_by_exit != schedule.tokens_by_exit(sequence.num_output_tokens)
    deepest = exits.allowed(sequence.request.budget)[-1]
    return any(exit_layer < deepest for exit_layer in sequence.tokens_by_exit)


def _with_outcome(report: RequestReport, promised: bool) -> RequestReport:
    """Of a latency budget: truncated, met, or not met: missed if it was promised, else degraded."""
    if not report.budget.has_latency:
        return report
    if report.finish_reason is FinishReason.DEADLINE:
        outcome = "truncated"
    elif report.met:
        outcome = "met"
    else:
        outcome = "missed" if promised else "degraded"
    return replace(report, outcome=outcome)


def is_over(sequence: Sequence, now: float) -> bool:
    """Whether the deadline of a request to be truncated has come."""
    deadline = _cut_s(sequence)
    return deadline is not None and now >= deadline


def would_overrun(sequence: Sequence, previous_s: float | None, now: float) -> bool:
    """Whether another token would come after the deadline of a request to be truncated.

    Args:
        sequence: has a new token.
        previous_s: when the one before it came.
        now: when it came.
    """
    deadline = _cut_s(sequence)
    gap_s = now - previous_s if previous_s is not None else 0.0
    return deadline is not None and now + gap_s > deadline


def _cut_s(sequence: Sequence) -> float | None:
    """When a request that is to be truncated ends at the latest; None for all others."""
    is_truncated = sequence.request.budget.on_miss is OnMiss.TRUNCATE
    return sequence.deadlines.e2e_s if is_truncated else None


def expired_in_queue(
    sequence: Sequence, now: float, retry_after_s: Callable[[Request], float | None]
) -> BudgetUnattainableError | None:
    """The refusal of a request that asked for one and whose time is over before any compute.

    Args:
        sequence: waits, or runs.
        now: the engine's clock.
        retry_after_s: predicted seconds until a request would fit; None: not known.
    """
    if (
        sequence.request.budget.on_miss is not OnMiss.REJECT
        or sequence.first_scheduled_s is not None
    ):
        return None
    deadlines = sequence.deadlines
    late_end = deadlines.e2e_s is not None and now >= deadlines.e2e_s
    late_start = deadlines.ttft_s is not None and now >= deadlines.ttft_s
    if not (late_end or late_start):
        return None
    seconds = retry_after_s(sequence.request)
    return BudgetUnattainableError(
        "The budget expired in the queue before any compute. Raise it or come back.",
        param="budget." + ("latency_ms" if late_end else "ttft_ms"),
        retry_after_s=now - sequence.request.arrival_s if seconds is None else seconds,
    )


def failure_error(failure: RowFailure) -> EngineError:
    """What the client of a row that failed is told."""
    detail = f" ({failure.detail})" if failure.detail else ""
    return EngineError(f"The model failed on this request: {failure.reason}{detail}.")
