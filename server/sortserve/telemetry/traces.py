"""Requests as OpenTelemetry spans: one for the HTTP request, and for each of its sequences one with
its time in the queue, of its prompt and of its answer below it.

Names and attributes are those of OpenTelemetry's conventions for HTTP servers and for generative
AI; what these do not know is named ``sortserve.*``. No prompt and no answer is in them.

Whether a request is traced is decided once, when it comes; of one that is not, nothing is kept. The
spans of a sequence are made when it is over, from its report, on a thread of their own: the
engine's thread only hands the report over.

This module is imported where traces are wanted alone: it needs the extra ``otel``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import NamedTuple

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sortserve import __version__
from sortserve.core.budget import Budget
from sortserve.core.request import FinishReason, RequestReport, StepRecord

__all__ = ["RequestSpan", "Tracing"]

logger = logging.getLogger(__name__)

CLOSE_S = 2.0
"""How long the end of the process waits for the last spans: their collector may be gone."""
PROVIDER = "sortserve"
"""``gen_ai.provider.name``."""
Value = str | int | float | bool
_PROPAGATOR = TraceContextTextMapPropagator()


class _Ended(NamedTuple):
    report: RequestReport
    epoch_ns: int
    """Zero of the engine's clock, in nanoseconds of the epoch."""


class Tracing:
    """Makes the spans of requests. Implements ``Observer``.

    Args:
        provider: decides which requests are sampled, and where spans go.
        clock: the engine's, in seconds.
        wall_ns: the time of day, in nanoseconds of the epoch.
    """

    def __init__(
        self,
        provider: TracerProvider,
        *,
        clock: Callable[[], float],
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("sortserve", __version__)
        self._clock = clock
        self._wall_ns = wall_ns
        self._ended: SimpleQueue[_Ended | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="traces", daemon=True)
        self._thread.start()

    # ---- the HTTP request ----

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> RequestSpan:
        """The span of a request that has come, as part of the trace that its headers name."""
        span = self._tracer.start_span(
            f"{method} {path}",
            context=_PROPAGATOR.extract(headers, context=Context()),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path},
            start_time=self._wall_ns(),
        )
        return RequestSpan(span, method, self._wall_ns)

    # ---- what the engine tells ----

    def on_finished(self, report: RequestReport) -> None:
        """Hand over a request that ended, if it is traced. Called on the engine's thread."""
        if report.trace is not None:
            epoch_ns = self._wall_ns() - _nanoseconds(self._clock())
            self._ended.put(_Ended(report, epoch_ns))

    def on_step(self, record: StepRecord) -> None:
        """Steps serve many requests: they are for the metrics."""

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """The span of its HTTP request says so."""

    def on_forecast_failed(self) -> None:
        """It is for the metrics."""

    def on_probe_step(self) -> None:
        """Nobody's step."""

    # ---- spans of sequences ----

    def close(self) -> None:
        """Make the last spans and send them, for ``CLOSE_S`` at most; call it when all is over."""
        self._ended.put(None)
        self._thread.join(CLOSE_S)
        sending = threading.Thread(target=self._provider.shutdown, name="traces end", daemon=True)
        sending.start()
        sending.join(CLOSE_S)

    def _work(self) -> None:
        while (ended := self._ended.get()) is not None:
            try:
                self._write(ended)
            except Exception:
                logger.exception("a request could not be traced")

    def _write(self, ended: _Ended) -> None:
        report, trace = ended.report, ended.report.trace
        assert trace is not None

        def at(seconds: float) -> int:
            return ended.epoch_ns + _nanoseconds(seconds)

        operation = trace.attributes.get("gen_ai.operation.name", "text_completion")
        model = trace.attributes.get("gen_ai.request.model", "")
        span = self._tracer.start_span(
            f"{operation} {model}".strip(),
            context=_PROPAGATOR.extract(trace.headers, context=Context()),
            kind=SpanKind.INTERNAL,
            start_time=at(report.arrival_s),
            attributes={**trace.attributes, **_attributes(report)},
        )
        for change in report.exit_changes:
            span.add_event(
                "sortserve.exit_change",
                {
                    "sortserve.exit.from": change.from_layer,
                    "sortserve.exit.to": change.to_layer,
                    "sortserve.exit.reason": change.reason,
                    "sortserve.output_tokens": change.num_tokens,
                },
                at(change.since_s),
            )
        if report.finish_reason is FinishReason.ERROR:
            span.set_attribute("error.type", "engine_error")
            span.set_status(Status(StatusCode.ERROR))
        below = set_span_in_context(span, Context())
        for name, start_s, end_s in _phases(report):
            phase = self._tracer.start_span(name, context=below, start_time=at(start_s))
            phase.end(at(end_s))
        span.end(at(report.finished_s))


class RequestSpan:
    """The span of one HTTP request."""

    def __init__(self, span: Span, method: str, wall_ns: Callable[[], int]) -> None:
        self._span = span
        self._method = method
        self._wall_ns = wall_ns

    @property
    def headers(self) -> dict[str, str] | None:
        """What names the span to those below it; None: the request is not sampled."""
        if not self._span.get_span_context().trace_flags.sampled:
            return None
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, context=set_span_in_context(self._span, Context()))
        return headers

    def end(self, *, route: str | None, status: int | None, request_id: str) -> None:
        """The reply is over.

        Args:
            route: the route's template; None where none was reached.
            status: of the reply; None if the client left before it began.
            request_id: of the request.
        """
        span = self._span
        span.set_attribute("sortserve.request_id", request_id)
        if route is not None:
            span.update_name(f"{self._method} {route}")
            span.set_attribute("http.route", route)
        if status is None:
            span.set_attribute("error.type", "client_disconnected")
        else:
            span.set_attribute("http.response.status_code", status)
            if status >= 400:
                span.set_attribute("error.type", str(status))
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))
        span.end(self._wall_ns())


def _phases(report: RequestReport) -> list[tuple[str, float, float]]:
    """Name, start and end of what a request went through, as far as it came."""
    end_s = report.finished_s
    scheduled_s, first_s, last_s = (
        report.first_scheduled_s,
        report.first_token_s,
        report.last_token_s,
    )
    phases = [("queue", report.arrival_s, end_s if scheduled_s is None else scheduled_s)]
    if scheduled_s is not None:
        phases.append(("prefill", scheduled_s, end_s if first_s is None else first_s))
    if first_s is not None and last_s is not None:
        phases.append(("decode", first_s, last_s))
    return phases


def _attributes(report: RequestReport) -> dict[str, Value | list[str]]:
    """What is known of a request when it is over."""
    attributes: dict[str, Value | list[str] | None] = {
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.response.id": report.request_id,
        "gen_ai.response.finish_reasons": [report.finish_reason.value],
        "gen_ai.usage.input_tokens": report.num_prompt_tokens,
        "gen_ai.usage.output_tokens": report.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": report.num_cached_tokens,
        "sortserve.exit_layer": report.exit_layer,
        "sortserve.tokens_by_exit": ",".join(
            f"{exit_layer}:{count}" for exit_layer, count in report.tokens_by_exit.items()
        ),
        "sortserve.compute": report.compute,
        "sortserve.score": report.score,
        "sortserve.degraded": report.degraded,
        "sortserve.preemptions": report.num_preemptions,
        "sortserve.budget.outcome": report.outcome,
        "sortserve.ttft_s": report.ttft_s,
        "sortserve.tpot_s": report.tpot_s,
        "sortserve.e2e_s": report.e2e_s,
    }
    for kind in report.budget.kinds:
        value = getattr(report.budget, kind)
        attributes[f"sortserve.budget.{kind}"] = str(value) if kind == "schedule" else value
    if report.predicted is not None:
        attributes["sortserve.predicted.ttft_s"] = report.predicted.ttft_s
        attributes["sortserve.predicted.tpot_s"] = report.predicted.tpot_s
        attributes["sortserve.predicted.e2e_s"] = report.predicted.e2e_s
    return {name: value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
