"""What a server has done since it came up, as plain numbers for ``GET /status``."""

from __future__ import annotations

import threading
from collections import Counter

from sortserve.core.budget import Budget
from sortserve.core.request import FinishReason, RequestReport, StepRecord

__all__ = ["Totals"]


class Totals:
    """Sums over all steps and requests. Implements ``Observer``.

    The engine's thread counts steps, event loops count refusals, so each sum has the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens_by_exit: Counter[int] = Counter()
        self._budgets = {"met": 0, "missed": 0, "rejected": 0}
        self._layers_run = 0
        self._layers_full = 0

    @property
    def tokens_by_exit(self) -> dict[int, int]:
        """Output tokens that each exit has made."""
        with self._lock:
            return dict(self._tokens_by_exit)

    @property
    def budgets(self) -> dict[str, int]:
        """Requests that bounded a time: ``met``, ``missed``, or ``rejected`` before they ran."""
        with self._lock:
            return dict(self._budgets)

    @property
    def layers(self) -> tuple[int, int]:
        """Token-layers run, and those that full depth would have run."""
        with self._lock:
            return self._layers_run, self._layers_full

    def on_step(self, record: StepRecord) -> None:
        """Count the tokens and the layers of a step."""
        with self._lock:
            self._tokens_by_exit.update(record.tokens_by_exit)
            if record.rows_by_exit:
                self._layers_run += record.layers_run
                self._layers_full += record.layers_full

    def on_finished(self, report: RequestReport) -> None:
        """Count what became of a budget; who left was not kept waiting."""
        if report.met is None or report.finish_reason is FinishReason.ABORT:
            return
        with self._lock:
            self._budgets["met" if report.met else "missed"] += 1

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """Count a refused budget; it is None where the request was not yet read."""
        if budget is None or not budget.has_latency:
            return
        with self._lock:
            self._budgets["rejected"] += 1

    def on_forecast_failed(self) -> None:
        """Nothing to count."""

    def on_probe_step(self) -> None:
        """Nothing to count: it made no token for anybody."""
