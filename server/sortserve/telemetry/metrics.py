"""Prometheus series of one server: what the engine and the HTTP service tell, as text to scrape.

Names follow vLLM's suffixes under the prefix ``sortserve_``. Every series carries ``model_name``;
those that differ by depth carry ``exit_layer``. No label takes a client's string, so the number of
series is bounded. ``docs/metrics.md`` lists them all, and a test compares.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.exposition import choose_encoder

from sortserve.core.budget import BUDGET_KINDS, Budget
from sortserve.core.request import (
    AdmissionStats,
    EngineStats,
    FinishReason,
    RequestReport,
    StepRecord,
)
from sortserve.telemetry.key_metrics import KeyMetrics
from sortserve.telemetry.series import (
    BUDGET_OUTCOMES,
    ERROR_RATIO_BOUNDS,
    HTTP_METHODS,
    LENGTH_ERROR_RATIO,
    QUALITY_BOUNDS,
    REQUEST_BOUNDS_S,
    ROWS_BOUNDS,
    TOKEN_BOUNDS_S,
    TTFT_BOUNDS_S,
    Families,
    WithoutCreated,
)
from sortserve.telemetry.timings import timings

__all__ = ["Metrics"]

SERVED = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE)
"""Ends of requests that got an answer: only their times are worth a histogram."""


class Metrics:
    """All series of one served model, in a registry of their own. Implements ``Observer``.

    Engine calls cost tens of microseconds: gauges are only written when somebody scrapes.

    Args:
        model_name: the served name, the label of every series.
        exits: exit layers served, ascending; their series exist from the start, at zero.
        version: of sortserve, for ``build_info``.
    """

    def __init__(self, model_name: str, exits: Sequence[int], *, version: str) -> None:
        self._model_name = model_name
        self._exits = tuple(exits)
        self._registry = CollectorRegistry()
        families = Families(self._registry, model_name, exits)
        self.keys = KeyMetrics(families)
        self._gauge, self._counter = families.gauge, families.counter
        self._histogram = families.histogram
        self._read_stats: Callable[[], EngineStats] = EngineStats
        self._read_admission: Callable[[], AdmissionStats] = AdmissionStats
        ProcessCollector(registry=self._registry)
        self._declare_gauges()
        self._declare_times()
        self._declare_counters()
        self._declare_budget_series()
        self._build_info[(version, platform.python_version())].set(1)
        for reason in FinishReason:
            self._finished[reason.value]
        for failure in ("exception", "non_finite", "text", "grammar"):
            self._failed_rows[failure]
        for kind in ("ttft", "tpot", "e2e"):
            self._violations[kind]
        for budget_kind in BUDGET_KINDS:
            for outcome in BUDGET_OUTCOMES if budget_kind.endswith("_ms") else ("met", "rejected"):
                self._budgets[(budget_kind, outcome)]

    # Declarations: one line a series.

    def _declare_gauges(self) -> None:
        gauge = self._gauge
        self._running = gauge("num_requests_running", "Requests that hold KV pages", "exit_layer")
        self._waiting = gauge("num_requests_waiting", "Requests in the queue")
        self._kv_usage = gauge("kv_cache_usage_perc", "Share of KV pages in use; 1 is all")
        self._kv_used = gauge("kv_pages_used", "KV pages held by live requests")
        self._kv_cached = gauge("kv_pages_cached", "Free KV pages that hold a reusable prefix")
        self._kv_total = gauge("kv_pages", "KV pages of the pool")
        self._pressure = gauge("pressure", "Share of the machine that the live promises need")
        self._overload_level = gauge("overload_level", "Exits that overload takes off")
        self._min_quality = gauge("min_quality", "Floor of requests that name none")
        self._default_exit = gauge(
            "default_exit_layer", "Where a request without a budget would start"
        )
        self._build_info = gauge("build_info", "Always 1", "version", "python_version")

    def _declare_times(self) -> None:
        exit_ = "exit_layer"
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token", TTFT_BOUNDS_S, exit_
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Gap between two tokens", TOKEN_BOUNDS_S, exit_
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per output token after the first",
            TOKEN_BOUNDS_S,
            exit_,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token", REQUEST_BOUNDS_S, exit_
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "Arrival to first step", REQUEST_BOUNDS_S
        )
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds", "First step to first token", REQUEST_BOUNDS_S
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "First token to last token", REQUEST_BOUNDS_S
        )
        self._step_duration = self._histogram(
            "step_duration_seconds", "One engine step", TOKEN_BOUNDS_S
        )
        self._batch_rows = self._histogram("batch_rows", "Rows of a step", ROWS_BOUNDS, exit_)
        self._depth_cap = self._histogram("step_depth_cap", "Deepest layer of a step", self._exits)

    def _declare_counters(self) -> None:
        counter = self._counter
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of scheduled requests")
        self._output_tokens = counter("generation_tokens", "Output tokens", "exit_layer")
        self._cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up")
        self._cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._preemptions = counter("num_preemptions", "Requests sent back to the queue")
        self._failed_rows = counter("failed_rows", "Rows that gave no token", "reason")
        self._failed_steps = counter("failed_steps", "Steps whose every row failed")
        self._retried_steps = counter("retried_steps", "Steps that failed and ran row by row")
        self._policy_failures = counter(
            "policy_failures", "Decisions of the policy or the forecast replaced by a plain rule"
        )
        self._probe_steps = counter("probe_steps", "Steps run for no request")
        self._finished = counter("request_success", "Requests that ended", "finished_reason")
        self._exit_changes = counter(
            "exit_changes", "Changes of depth in flight", "from", "to", "reason"
        )
        self._layers_run = counter("layers_run", "Token-layers run")
        self._layers_full = counter("layers_full", "Token-layers that full depth would have run")
        self._http_requests = counter(
            "http_requests", "HTTP requests answered", "route", "method", "status"
        )

    def _declare_budget_series(self) -> None:
        self._budgets = self._counter(
            "budget_requests", "Budgets by what became of them", "kind", "outcome"
        )
        self._quality = self._histogram(
            "quality_score", "Mean score of the tokens of a request", QUALITY_BOUNDS
        )
        self._goodput = self._counter(
            "quality_goodput", "Weight times mean score of requests that missed no time"
        )
        self._weights = self._counter("request_weight", "Weight of requests that got an answer")
        self._violations = self._counter("slo_violation", "Times that were not kept", "kind")
        self._rejected = self._counter("admission_rejected", "Requests refused", "reason")
        bounds = {"ttft": TTFT_BOUNDS_S, "tpot": TOKEN_BOUNDS_S, "e2e": REQUEST_BOUNDS_S}
        self._predicted = {
            kind: self._histogram(f"predicted_{kind}_seconds", f"Predicted {kind.upper()}", bound)
            for kind, bound in bounds.items()
        }
        self._error_ratio = self._histogram(
            "prediction_error_ratio", "Actual over predicted", ERROR_RATIO_BOUNDS, "kind"
        )
        self._length_ratio = self._histogram(*LENGTH_ERROR_RATIO)

    # What the engine tells.

    def on_step(self, record: StepRecord) -> None:
        """Count one step. Called on the engine's thread."""
        for reason, num_rows in record.failed_rows.items():
            self._failed_rows[reason].inc(num_rows)
        if record.num_preemptions:
            self._preemptions[()].inc(record.num_preemptions)
        for change in record.exit_changes:
            self._exit_changes[change].inc()
        if record.was_retried:
            self._retried_steps[()].inc()
        if record.policy_failed:
            self._policy_failures[()].inc()
        if record.num_prompt_tokens:
            self._prompt_tokens[()].inc(record.num_prompt_tokens)
            self._cache_queries[()].inc(record.prefix_cache_queries)
            self._cache_hits[()].inc(record.prefix_cache_hits)
        if record.rows_by_exit:
            self._count_work(record)
        else:
            self._failed_steps[()].inc()

    def _count_work(self, record: StepRecord) -> None:
        """Count what the rows of a step did."""
        self._step_duration[()].observe(record.duration_s)
        if record.predicted_s:
            self._error_ratio["step"].observe(record.duration_s / record.predicted_s)
        self._depth_cap[()].observe(record.depth_cap)
        self._layers_run[()].inc(record.layers_run)
        self._layers_full[()].inc(record.layers_full)
        for exit_layer, num_rows in record.rows_by_exit.items():
            self._batch_rows[exit_layer].observe(num_rows)
        for exit_layer, num_tokens in record.tokens_by_exit.items():
            self._output_tokens[exit_layer].inc(num_tokens)
        for exit_layer, seconds in record.ttfts:
            self._ttft[exit_layer].observe(seconds)
        for exit_layer, seconds in record.itls:
            self._itl[exit_layer].observe(seconds)

    def on_finished(self, report: RequestReport) -> None:
        """Count one request that ended. Called on the engine's thread."""
        self._finished[report.finish_reason.value].inc()
        self._count_budget(report)
        if report.finish_reason not in SERVED:
            return
        self._count_quality(report)
        exit_layer = report.exit_layer
        self._e2e[exit_layer].observe(report.e2e_s)
        if report.tpot_s is not None:
            self._tpot[exit_layer].observe(report.tpot_s)
        if report.queue_s is not None:
            self._queue_time[()].observe(report.queue_s)
        first, last = report.first_token_s, report.last_token_s
        if first is not None and report.first_scheduled_s is not None:
            self._prefill_time[()].observe(first - report.first_scheduled_s)
        if first is not None and last is not None:
            self._decode_time[()].observe(last - first)
        if report.finish_reason is FinishReason.STOP and report.expected_tokens:
            self._length_ratio[()].observe(report.expected_tokens / report.num_output_tokens)
        self._observe_predictions(report)

    def _count_quality(self, report: RequestReport) -> None:
        """Count what an answer was worth."""
        self._weights[()].inc(report.weight)
        if report.num_output_tokens == 0:
            return
        self._quality[()].observe(report.score)
        if report.met is not False:
            self._goodput[()].inc(report.weight * report.score)

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """Count one request refused before any compute; no budget if it was not yet read."""
        self._rejected[reason].inc()
        for kind in budget.kinds if budget is not None else ():
            self._budgets[(kind, "rejected")].inc()

    def on_forecast_failed(self) -> None:
        """Count a request that was let in although nothing could be predicted."""
        self._policy_failures[()].inc()

    def on_probe_step(self) -> None:
        """Count a step that served nobody. Called on the engine's thread."""
        self._probe_steps[()].inc()

    def _count_budget(self, report: RequestReport) -> None:
        if report.finish_reason is FinishReason.ABORT:
            return  # the client left: nobody was kept waiting
        for kind in report.budget.kinds:
            # A bound on depth or compute is kept by construction; only times can be missed.
            timed = kind.endswith("_ms")
            outcome = (report.outcome or ("met" if report.met else "missed")) if timed else "met"
            self._budgets[(kind, outcome)].inc()
        for timing in timings(report):
            limit_s, actual_s = timing.limit_s, timing.actual_s
            if limit_s is not None and actual_s is not None and actual_s > limit_s:
                self._violations[timing.kind].inc()

    def _observe_predictions(self, report: RequestReport) -> None:
        for timing in timings(report):
            if timing.predicted_s is None:
                continue
            self._predicted[timing.kind][()].observe(timing.predicted_s)
            if timing.actual_s is not None and timing.predicted_s > 0:
                self._error_ratio[timing.kind].observe(timing.actual_s / timing.predicted_s)

    # What the HTTP service tells and asks.

    def http_request(self, route: str, method: str, status: int) -> None:
        """Count one answered HTTP request.

        Args:
            route: the route's template (``/v1/models/{name}``), never the raw path.
            method: HTTP method; an invented one is counted as ``OTHER``.
            status: HTTP status code.
        """
        known = method if method in HTTP_METHODS else "OTHER"
        self._http_requests[(route, known, status)].inc()

    def set_model_config(self, labels: Mapping[str, str]) -> None:
        """Publish what the model computes with as labels of ``model_config_info``; call it once."""
        self._publish("model_config_info", "what the model computes with", labels)

    def set_cache_config(self, **config: int | str | bool) -> None:
        """Publish the cache's shape as labels of ``cache_config_info``; call it once."""
        self._publish("cache_config_info", "the KV cache's configuration", config)

    def _publish(self, name: str, what: str, labels: Mapping[str, object]) -> None:
        Gauge(
            f"sortserve_{name}",
            f"Always 1; {what} as labels",
            ["model_name", *labels],
            registry=self._registry,
        ).labels(model_name=self._model_name, **labels).set(1)

    def watch(
        self,
        read_stats: Callable[[], EngineStats],
        read_admission: Callable[[], AdmissionStats] | None = None,
    ) -> None:
        """Read the engine's state from here at each scrape, so that an idle engine shows too.

        Args:
            read_stats: the state after the last step.
            read_admission: what a newcomer would meet now.
        """
        self._read_stats = read_stats
        self._read_admission = read_admission or self._read_admission

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """The exposition text and its content type, as the ``Accept`` header wishes."""
        self._write_gauges(self._read_stats())
        self._write_admission(self._read_admission())
        encode, content_type = choose_encoder(accept or "")
        return encode(WithoutCreated(self._registry)), content_type

    def _write_gauges(self, stats: EngineStats) -> None:
        for exit_layer in self._exits:
            self._running[exit_layer].set(stats.running_by_exit.get(exit_layer, 0))
        self._waiting[()].set(stats.num_waiting)
        total = stats.kv_pages_total
        self._kv_usage[()].set(stats.kv_pages_used / total if total else 0.0)
        self._kv_used[()].set(stats.kv_pages_used)
        self._kv_cached[()].set(stats.kv_pages_cached)
        self._kv_total[()].set(total)

    def _write_admission(self, stats: AdmissionStats) -> None:
        self._pressure[()].set(stats.pressure)
        self._overload_level[()].set(stats.overload_level)
        self._min_quality[()].set(stats.min_quality)
        self._default_exit[()].set(stats.default_exit_layer)
