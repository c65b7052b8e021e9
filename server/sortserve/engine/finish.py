"""How a request ends: the report made from its sequence (no torch)."""

from __future__ import annotations

from dataclasses import replace

from sortserve.core.budget import ExitTable
from sortserve.core.request import FinishReason, RequestReport
from sortserve.core.sequence import Sequence

__all__ = ["make_report"]


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
        compute=_compute_share(sequence, exits),
        predicted=sequence.estimate,
        arrival_s=sequence.request.arrival_s,
        first_scheduled_s=sequence.first_scheduled_s,
        first_token_s=sequence.first_token_s,
        last_token_s=sequence.last_token_s,
        finished_s=now,
        num_preemptions=sequence.num_preemptions,
        seed=sequence.seed,
    )
    return _with_outcome(report, promised)


def _compute_share(sequence: Sequence, exits: ExitTable) -> float:
    if not sequence.tokens_by_exit:
        return exits[sequence.exit_layer].compute
    weighted = sum(exits[e].compute * n for e, n in sequence.tokens_by_exit.items())
    return weighted / sequence.num_output_tokens


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
