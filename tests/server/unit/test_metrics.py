"""The series, read as Prometheus reads them: from the exposition text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sortserve.core.budget import Budget
from sortserve.core.request import (
    AdmissionStats,
    EngineStats,
    Estimate,
    FinishReason,
)
from sortserve.telemetry.metrics import Metrics
from support.records import EXITS, REPORT, STEP

ROOT = Path(__file__).parents[3]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny", EXITS, version="1.2.3")


def read(metrics: Metrics, series: str, **labels: str) -> float | None:
    """The value of one series (by its name without prefix), or None if there is none."""
    text = metrics.render()[0].decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            wanted = {"model_name": "tiny", **labels}
            if sample.name == f"sortserve_{series}" and sample.labels == wanted:
                return float(sample.value)
    return None


# Steps


def test_a_step_is_counted_by_exit(metrics: Metrics) -> None:
    metrics.on_step(STEP)

    assert read(metrics, "generation_tokens_total", exit_layer="9") == 3
    assert read(metrics, "prediction_error_ratio_count", kind="step") == 1
    assert read(metrics, "generation_tokens_total", exit_layer="30") == 1
    assert read(metrics, "batch_rows_sum", exit_layer="9") == 3
    assert read(metrics, "time_to_first_token_seconds_count", exit_layer="30") == 1
    assert read(metrics, "time_to_first_token_seconds_count", exit_layer="9") == 0
    assert read(metrics, "inter_token_latency_seconds_count", exit_layer="9") == 3
    assert read(metrics, "inter_token_latency_seconds_bucket", exit_layer="9", le="0.005") == 2
    assert read(metrics, "step_duration_seconds_sum") == pytest.approx(0.02)
    assert read(metrics, "num_preemptions_total") == 1
    assert read(metrics, "prompt_tokens_total") == 26
    assert read(metrics, "prefix_cache_queries_total") == 26
    assert read(metrics, "prefix_cache_hits_total") == 16


def test_compute_saved_is_one_minus_layers_run_over_layers_full(metrics: Metrics) -> None:
    metrics.on_step(STEP)
    metrics.on_step(STEP)

    assert read(metrics, "layers_run_total") == 2 * 327
    assert read(metrics, "layers_full_total") == 2 * 390


def test_a_step_falls_into_the_bucket_of_its_depth(metrics: Metrics) -> None:
    metrics.on_step(STEP)
    metrics.on_step(replace(STEP, depth_cap=9))

    assert read(metrics, "step_depth_cap_bucket", le="9.0") == 1
    assert read(metrics, "step_depth_cap_bucket", le="30.0") == 2


def test_a_change_of_depth_is_counted_with_its_reason(metrics: Metrics) -> None:
    metrics.on_step(STEP)

    labels = {"from": "30", "to": "9", "reason": "late"}
    assert read(metrics, "exit_changes_total", **labels) == 1


# Gauges


def test_gauges_show_the_state_of_the_engine(metrics: Metrics) -> None:
    stats = EngineStats(
        running_by_exit={9: 2},
        num_waiting=5,
        kv_pages_used=30,
        kv_pages_cached=4,
        kv_pages_total=40,
    )

    metrics.watch(lambda: stats)

    assert read(metrics, "num_requests_running", exit_layer="9") == 2
    assert read(metrics, "num_requests_running", exit_layer="30") == 0
    assert read(metrics, "num_requests_waiting") == 5
    assert read(metrics, "kv_pages_used") == 30
    assert read(metrics, "kv_pages_cached") == 4
    assert read(metrics, "kv_pages") == 40
    assert read(metrics, "kv_cache_usage_perc") == 0.75


def test_a_watched_engine_is_read_at_each_scrape(metrics: Metrics) -> None:
    states = iter([EngineStats(num_waiting=1), EngineStats(num_waiting=0)])

    metrics.watch(lambda: next(states))

    assert read(metrics, "num_requests_waiting") == 1
    assert read(metrics, "num_requests_waiting") == 0


def test_gauges_show_what_a_newcomer_would_meet(metrics: Metrics) -> None:
    stats = AdmissionStats(pressure=0.7, overload_level=1, min_quality=0.5, default_exit_layer=9)

    metrics.watch(EngineStats, lambda: stats)

    assert read(metrics, "pressure") == 0.7
    assert read(metrics, "overload_level") == 1
    assert read(metrics, "min_quality") == 0.5
    assert read(metrics, "default_exit_layer") == 9


# Requests


def test_the_quality_of_what_was_delivered_is_counted_with_its_weight(metrics: Metrics) -> None:
    metrics.on_finished(replace(REPORT, score=0.5, weight=4.0))
    late = Budget(latency_ms=1)
    metrics.on_finished(replace(REPORT, score=1.0, weight=2.0, budget=late, outcome="missed"))
    metrics.on_finished(replace(REPORT, score=1.0, finish_reason=FinishReason.ABORT))
    metrics.on_finished(replace(REPORT, num_output_tokens=0, finish_reason=FinishReason.DEADLINE))

    assert read(metrics, "quality_score_sum") == 1.5
    assert read(metrics, "quality_score_count") == 2
    assert read(metrics, "quality_goodput_total") == 2.0, "the second missed its budget"
    assert read(metrics, "request_weight_total") == 7.0


def test_the_times_of_a_finished_request_add_up(metrics: Metrics) -> None:
    metrics.on_finished(REPORT)

    assert read(metrics, "request_success_total", finished_reason="stop") == 1
    assert read(metrics, "request_queue_time_seconds_sum") == pytest.approx(0.25)
    assert read(metrics, "request_prefill_time_seconds_sum") == pytest.approx(0.25)
    assert read(metrics, "request_decode_time_seconds_sum") == pytest.approx(1.0)
    assert read(metrics, "e2e_request_latency_seconds_sum", exit_layer="9") == pytest.approx(1.5)
    name = "request_time_per_output_token_seconds_sum"
    assert read(metrics, name, exit_layer="9") == pytest.approx(0.1)


def test_an_aborted_request_is_counted_but_its_times_are_not(metrics: Metrics) -> None:
    metrics.on_finished(replace(REPORT, finish_reason=FinishReason.ABORT))

    assert read(metrics, "request_success_total", finished_reason="abort") == 1
    assert read(metrics, "e2e_request_latency_seconds_count", exit_layer="9") == 0


def test_a_request_that_ended_in_the_queue_has_no_decode_time(metrics: Metrics) -> None:
    ended = replace(REPORT, first_scheduled_s=None, first_token_s=None, last_token_s=None)

    metrics.on_finished(replace(ended, num_output_tokens=0, finish_reason=FinishReason.DEADLINE))

    assert read(metrics, "request_queue_time_seconds_count") == 0
    assert read(metrics, "request_decode_time_seconds_count") == 0


# Budgets


def test_each_bound_of_a_budget_is_counted_once_with_its_outcome(metrics: Metrics) -> None:
    budget = Budget(latency_ms=1000, ttft_ms=600, min_exit_layer=9)

    metrics.on_finished(replace(REPORT, budget=budget, outcome="missed"))

    assert read(metrics, "budget_requests_total", kind="latency_ms", outcome="missed") == 1
    assert read(metrics, "budget_requests_total", kind="ttft_ms", outcome="missed") == 1
    assert read(metrics, "budget_requests_total", kind="min_exit_layer", outcome="met") == 1


def test_a_budget_without_a_time_is_met(metrics: Metrics) -> None:
    metrics.on_finished(replace(REPORT, budget=Budget(exit_layer=9)))

    assert read(metrics, "budget_requests_total", kind="exit_layer", outcome="met") == 1


def test_only_the_times_that_were_not_kept_are_violations(metrics: Metrics) -> None:
    budget = Budget(latency_ms=1000, ttft_ms=600, tpot_ms=99)

    metrics.on_finished(replace(REPORT, budget=budget, outcome="missed"))

    assert read(metrics, "slo_violation_total", kind="e2e") == 1
    assert read(metrics, "slo_violation_total", kind="tpot") == 1
    assert read(metrics, "slo_violation_total", kind="ttft") == 0


def test_a_client_that_leaves_violates_nothing(metrics: Metrics) -> None:
    report = replace(REPORT, budget=Budget(latency_ms=1), finish_reason=FinishReason.ABORT)

    metrics.on_finished(report)

    assert read(metrics, "slo_violation_total", kind="e2e") == 0
    for outcome in ("met", "missed", "degraded"):
        assert read(metrics, "budget_requests_total", kind="latency_ms", outcome=outcome) == 0


def test_a_rejection_is_counted_by_reason_and_by_bound(metrics: Metrics) -> None:
    metrics.on_rejected("budget_unattainable", Budget(latency_ms=5))
    metrics.on_rejected("queue_full", None)

    assert read(metrics, "admission_rejected_total", reason="budget_unattainable") == 1
    assert read(metrics, "admission_rejected_total", reason="queue_full") == 1
    assert read(metrics, "budget_requests_total", kind="latency_ms", outcome="rejected") == 1


def test_predictions_are_compared_with_what_came(metrics: Metrics) -> None:
    predicted = Estimate(ttft_s=0.25, tpot_s=0.2, e2e_s=99.0)

    metrics.on_finished(replace(REPORT, predicted=predicted))

    assert read(metrics, "predicted_ttft_seconds_sum") == pytest.approx(0.25)
    assert read(metrics, "predicted_tpot_seconds_sum") == pytest.approx(0.2)
    assert read(metrics, "prediction_error_ratio_sum", kind="ttft") == pytest.approx(0.5 / 0.25)
    assert read(metrics, "prediction_error_ratio_sum", kind="tpot") == pytest.approx(0.1 / 0.2)


def test_the_end_is_predicted_for_the_tokens_that_came(metrics: Metrics) -> None:
    predicted = Estimate(ttft_s=0.5, tpot_s=0.1, e2e_s=99.0)

    metrics.on_finished(replace(REPORT, predicted=predicted))

    assert read(metrics, "predicted_e2e_seconds_sum") == pytest.approx(1.5)
    assert read(metrics, "prediction_error_ratio_sum", kind="e2e") == pytest.approx(1.0)


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.DEADLINE])
def test_only_answers_that_ended_themselves_judge_the_expected_length(
    metrics: Metrics, reason: FinishReason
) -> None:
    report = replace(REPORT, finish_reason=FinishReason.STOP, num_output_tokens=20)

    metrics.on_finished(replace(report, expected_tokens=30))
    metrics.on_finished(replace(report, expected_tokens=30, finish_reason=reason))

    assert read(metrics, "length_error_ratio_count") == 1
    assert read(metrics, "length_error_ratio_sum") == pytest.approx(1.5)


# The page


def test_http_requests_are_counted_by_route_method_and_status(metrics: Metrics) -> None:
    metrics.http_request("/generate", "POST", 200)
    metrics.http_request("/generate", "BREW", 405)

    name = "http_requests_total"
    assert read(metrics, name, route="/generate", method="POST", status="200") == 1
    assert read(metrics, name, route="/generate", method="OTHER", status="405") == 1


def test_the_cache_configuration_is_a_set_of_labels(metrics: Metrics) -> None:
    metrics.set_cache_config(block_size=16, num_gpu_blocks=100)

    assert read(metrics, "cache_config_info", block_size="16", num_gpu_blocks="100") == 1


def test_what_the_model_computes_with_is_a_set_of_labels(metrics: Metrics) -> None:
    metrics.set_model_config({"dtype": "bfloat16", "quantization": "nf4"})

    assert read(metrics, "model_config_info", dtype="bfloat16", quantization="nf4") == 1


def test_two_servers_in_one_process_do_not_share_series(metrics: Metrics) -> None:
    other = Metrics("tiny", EXITS, version="1.2.3")

    other.on_step(STEP)

    assert read(other, "num_preemptions_total") == 1
    assert read(metrics, "num_preemptions_total") == 0


def test_the_format_follows_the_accept_header(metrics: Metrics) -> None:
    assert metrics.render()[1].startswith("text/plain")
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_a_served_name_may_hold_any_character() -> None:
    metrics = Metrics('a "b"\n\\c', EXITS, version="1")

    families = list(text_string_to_metric_families(metrics.render()[0].decode()))

    names = {
        s.labels["model_name"] for f in families for s in f.samples if "model_name" in s.labels
    }
    assert names == {'a "b"\n\\c'}


def test_every_series_is_documented_and_every_documented_series_exists(metrics: Metrics) -> None:
    metrics.set_cache_config(block_size=16)
    metrics.set_model_config({"dtype": "bfloat16"})

    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    types = re.findall(r"^# TYPE sortserve_(\w+) ", metrics.render()[0].decode(), re.MULTILINE)

    assert documented == set(types)


def test_every_series_carries_the_model_name(metrics: Metrics) -> None:
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            if sample.name.startswith("sortserve_"):
                assert sample.labels["model_name"] == "tiny"
