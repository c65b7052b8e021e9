"""What became of a budget, as one line of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sortserve_client import BudgetReport

__all__ = ["story"]


def story(report: BudgetReport) -> str:
    """``exit 18 | 741 ms, predicted 760 | first token 62 ms | budget met``."""
    by_exit = sorted(report.tokens_by_exit.items())
    used = ", ".join(f"{exit_layer} ({count} tokens)" for exit_layer, count in by_exit)
    parts = [f"exit {used or report.exit_layer}"]
    if report.actual_ms is not None:
        predicted = "" if report.predicted_ms is None else f", predicted {report.predicted_ms:.0f}"
        parts.append(f"{report.actual_ms:.0f} ms{predicted}")
    if report.ttft_ms is not None:
        parts.append(f"first token {report.ttft_ms:.0f} ms")
    if report.met is not None:
        parts.append("budget met" if report.met else "budget missed")
    if report.degraded:
        parts.append("made shallower")
    return " | ".join(parts)
