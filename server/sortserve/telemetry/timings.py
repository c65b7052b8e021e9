"""The times of a finished request, as metrics compare them."""

from __future__ import annotations

from typing import NamedTuple

from sortserve.core.request import RequestReport

__all__ = ["Timing", "timings"]


class Timing(NamedTuple):
    """One time of a request in seconds: what was asked for, predicted, and what it came to."""

    kind: str
    limit_s: float | None
    predicted_s: float | None
    actual_s: float | None


def timings(report: RequestReport) -> tuple[Timing, Timing, Timing]:
    """The three times of a finished request: TTFT, TPOT, E2E.

    A request that ended without a first token waited until it ended. The predicted E2E is taken for
    the tokens that came, not for ``max_tokens``: an early stop is no error of the cost model.
    """
    budget, predicted = report.budget, report.predicted
    num_gaps = max(report.num_output_tokens - 1, 0)
    waited_s = report.ttft_s if report.ttft_s is not None else report.e2e_s
    times: tuple[float | None, float | None, float | None] = (None, None, None)
    if predicted is not None:
        e2e_s = predicted.ttft_s + num_gaps * predicted.tpot_s
        times = (predicted.ttft_s, predicted.tpot_s, e2e_s)
    return (
        Timing("ttft", _seconds(budget.ttft_ms), times[0], waited_s),
        Timing("tpot", _seconds(budget.tpot_ms), times[1], report.tpot_s),
        Timing("e2e", _seconds(budget.latency_ms), times[2], report.e2e_s),
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
