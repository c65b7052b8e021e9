"""What was made for vLLM finds its series, and the text stays one that Prometheus reads."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from sortserve.core.request import EngineStats, FinishReason
from sortserve.telemetry.metrics import Metrics
from sortserve.telemetry.vllm_names import SAME, MetricsWithVllmNames
from support.records import EXITS, REPORT, STEP

PAGE = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
TWO_FIRST_TOKENS = replace(STEP, ttfts=((30, 0.05), (9, 0.03)), itls=((9, 0.004), (9, 0.02)))


@pytest.fixture
def metrics() -> MetricsWithVllmNames:
    metrics = MetricsWithVllmNames("tiny", EXITS, version="1")
    metrics.set_cache_config(block_size=16, num_gpu_blocks=10)
    metrics.set_model_config({"dtype": "float32"})
    stats = EngineStats(
        running_by_exit={9: 2, 30: 3}, num_waiting=5, kv_pages_used=30, kv_pages_total=40
    )
    metrics.watch(lambda: stats)
    metrics.on_step(TWO_FIRST_TOKENS)
    metrics.on_finished(REPORT)
    metrics.on_finished(replace(REPORT, exit_layer=30))
    metrics.on_finished(replace(REPORT, finish_reason=FinishReason.ABORT))
    return metrics


def text_of(metrics: Metrics, accept: str = "") -> str:
    return metrics.render(accept)[0].decode()


def read(metrics: Metrics, series: str, **labels: str) -> float:
    wanted = {"model_name": "tiny", "engine": "0", **labels}
    [value] = [
        sample.value
        for family in text_string_to_metric_families(text_of(metrics))
        for sample in family.samples
        if sample.name == f"vllm:{series}" and sample.labels == wanted
    ]
    return value


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ("num_requests_running", 5),
        ("num_requests_waiting", 5),
        ("kv_cache_usage_perc", 0.75),
        ("gpu_cache_usage_perc", 0.75),
        ("prompt_tokens_total", 26),
        ("generation_tokens_total", 4),
        ("prefix_cache_queries_total", 26),
        ("gpu_prefix_cache_hits_total", 16),
        ("time_to_first_token_seconds_count", 2),
        ("time_to_first_token_seconds_sum", 0.08),
        ("inter_token_latency_seconds_count", 2),
        ("time_per_output_token_seconds_count", 2),
        ("e2e_request_latency_seconds_count", 2),
        ("request_queue_time_seconds_sum", 0.5),
        ("request_prompt_tokens_sum", 52),
        ("request_generation_tokens_sum", 22),
        ("request_inference_time_seconds_sum", 2.5),
        ("iteration_tokens_total_sum", 30),
    ],
)
def test_exits_are_added_up(metrics: Metrics, series: str, value: float) -> None:
    assert read(metrics, series) == pytest.approx(value)


def test_buckets_are_added_up_one_by_one(metrics: Metrics) -> None:
    assert read(metrics, "time_to_first_token_seconds_bucket", le="0.03") == 1
    assert read(metrics, "time_to_first_token_seconds_bucket", le="0.06") == 2
    assert read(metrics, "time_to_first_token_seconds_bucket", le="+Inf") == 2


def test_other_labels_stay(metrics: Metrics) -> None:
    assert read(metrics, "request_success_total", finished_reason="stop") == 2
    assert read(metrics, "cache_config_info", block_size="16", num_gpu_blocks="10") == 1


def test_our_own_series_are_what_they_are_without(metrics: Metrics) -> None:
    plain = Metrics("tiny", EXITS, version="1")
    plain.set_cache_config(block_size=16, num_gpu_blocks=10)
    plain.set_model_config({"dtype": "float32"})

    assert "vllm:" not in text_of(plain)
    assert set(names_in(text_of(plain))) < set(names_in(text_of(metrics)))
    added = set(names_in(text_of(metrics))) - set(names_in(text_of(plain)))
    assert all(name.startswith("vllm:") for name in added)


def names_in(text: str) -> Sequence[str]:
    return re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)


def test_both_formats_are_valid_and_no_family_comes_twice(metrics: Metrics) -> None:
    text = text_of(metrics)
    accept = "application/openmetrics-text; version=1.0.0"

    families = list(text_string_to_metric_families(text))
    read_open = openmetrics.text_string_to_metric_families
    opened = list(read_open(text_of(metrics, accept)))  # type: ignore[no-untyped-call]

    assert len(names_in(text)) == len(set(names_in(text)))
    assert {f"vllm:{name}" for names in SAME.values() for name in names} <= {
        family.name for family in families
    }
    assert len(opened) >= len(SAME)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_no_complaint_of_the_form(metrics: Metrics) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text_of(metrics),
        capture_output=True,
        text=True,
        check=False,
    )

    # It reads the text, and lints names: vLLM's have colons and suffixes that it would not choose.
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("vllm:")]
    assert complaints == []


def test_the_page_names_every_series(metrics: Metrics) -> None:
    told = {name for name in names_in(text_of(metrics)) if name.startswith("vllm:")}

    on_page = set(re.findall(r"`(vllm:[a-z0-9_]+)`", PAGE))
    assert {name.removesuffix("_total") for name in told} == {
        name.removesuffix("_total") for name in on_page
    }
