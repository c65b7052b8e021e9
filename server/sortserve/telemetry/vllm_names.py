"""The series that vLLM's users know, also under vLLM's names.

Boards, autoscalers and load generators that were made for vLLM ask for ``vllm:...``. They know no
exits, so what differs by depth is added up, and every series has vLLM's label ``engine``. A few
histograms that vLLM has and nobody here reads are kept for them alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from sortserve.core.request import RequestReport, StepRecord
from sortserve.telemetry.metrics import SERVED, Metrics
from sortserve.telemetry.series import REQUEST_BOUNDS_S

__all__ = ["SAME", "MetricsWithVllmNames"]

SAME = {
    **{
        name: (name,)
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "inter_token_latency_seconds",
            "time_to_first_token_seconds",
            "request_time_per_output_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "prompt_tokens",
            "generation_tokens",
            "num_preemptions",
            "request_success",
            "cache_config_info",
        )
    },
    # What newer versions renamed has the older name too.
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "kv_cache_usage_perc": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "prefix_cache_queries": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_cache_hits": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
}
"""Our families by name, and what each is called in vLLM; both without prefix."""
ENGINE = {"engine": "0"}
OURS, THEIRS = "sortserve_", "vllm:"
TOKEN_COUNT_BOUNDS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
STEP_TOKEN_BOUNDS = (1, 8, *(2**e for e in range(4, 15)))


class MetricsWithVllmNames(Metrics):
    """All series of ``Metrics``, and vLLM's."""

    def __init__(self, model_name: str, exits: Sequence[int], *, version: str) -> None:
        super().__init__(model_name, exits, version=version)
        self._registry = _BothNames(self._registry)

        def histogram(name: str, doc: str, bounds: Sequence[float]) -> Histogram:
            family = Histogram(
                THEIRS + name,
                doc,
                ["model_name", *ENGINE],
                registry=self._registry,
                buckets=bounds,
            )
            return family.labels(model_name, *ENGINE.values())

        self._prompt_lengths = histogram(
            "request_prompt_tokens", "Prompt tokens of a request", TOKEN_COUNT_BOUNDS
        )
        self._output_lengths = histogram(
            "request_generation_tokens", "Output tokens of a request", TOKEN_COUNT_BOUNDS
        )
        self._inference_time = histogram(
            "request_inference_time_seconds", "First step to last token", REQUEST_BOUNDS_S
        )
        self._step_tokens = histogram(
            "iteration_tokens_total", "Prompt and output tokens of a step", STEP_TOKEN_BOUNDS
        )

    def on_step(self, record: StepRecord) -> None:
        """Count one step. Called on the engine's thread."""
        super().on_step(record)
        if record.rows_by_exit:
            num_tokens = record.num_prompt_tokens + sum(record.tokens_by_exit.values())
            self._step_tokens.observe(num_tokens)

    def on_finished(self, report: RequestReport) -> None:
        """Count one request that ended. Called on the engine's thread."""
        super().on_finished(report)
        if report.finish_reason not in SERVED:
            return
        self._prompt_lengths.observe(report.num_prompt_tokens)
        self._output_lengths.observe(report.num_output_tokens)
        if report.first_scheduled_s is not None and report.last_token_s is not None:
            self._inference_time.observe(report.last_token_s - report.first_scheduled_s)


class _BothNames(CollectorRegistry):
    """A registry that tells some of its families twice."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._plain = registry

    def register(self, collector: Collector) -> None:
        """Add a family."""
        self._plain.register(collector)

    def collect(self) -> Iterable[Metric]:
        """What there is, and what vLLM calls it."""
        families = list(self._plain.collect())
        yield from families
        for family in families:
            for name in SAME.get(family.name.removeprefix(OURS), ()):
                yield _renamed(family, name)


def _renamed(family: Metric, name: str) -> Metric:
    """A family under another name, its exits added up."""
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        labels = {k: v for k, v in sample.labels.items() if k != "exit_layer"} | ENGINE
        key = (sample.name.removeprefix(family.name), tuple(labels.items()))
        values[key] = values.get(key, 0.0) + sample.value
    renamed = Metric(THEIRS + name, family.documentation, family.type)
    renamed.samples = [
        Sample(renamed.name + suffix, dict(labels), value)
        for (suffix, labels), value in values.items()
    ]
    return renamed
