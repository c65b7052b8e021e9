"""Compose, Prometheus and Grafana cannot be run in a test: each promise is read off their files.

The Dockerfiles are in test_dockerfiles.py.

Every query of the dashboard and of the alerts is held against the series that a real ``Metrics``
exposes after a synthetic run: each selector must select something.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sortserve.core.budget import Budget
from sortserve.core.request import (
    AdmissionStats,
    EngineStats,
    Estimate,
    FinishReason,
    RequestReport,
    StepRecord,
)
from sortserve.process.config import ServeSettings
from sortserve.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile.cpu", DOCKER / "Dockerfile.cuda"]
DASHBOARD = DOCKER / "grafana" / "dashboards" / "sortserve.json"

# Compose


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def services() -> dict[str, Any]:
    compose: dict[str, Any] = load(DOCKER / "compose.yaml")
    return dict(compose["services"])


def test_images_of_services_have_a_version_and_ours_is_built_from_a_dockerfile() -> None:
    overlay = load(DOCKER / "compose.cuda.yaml")["services"]["server"]
    for service in [*services().values(), overlay]:
        tag = service["image"].rpartition(":")[2]
        assert tag not in ("", "latest")
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]) in DOCKERFILES
            assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        else:
            assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag)


def test_every_service_has_a_health_check_of_its_own_or_of_its_image() -> None:
    for name, service in services().items():
        own = service.get("healthcheck", {}).get("test")
        assert own or "build" in service, name  # test_dockerfiles.py has those of images


def test_the_server_cannot_write_its_root() -> None:
    server = services()["server"]

    assert server["read_only"] is True
    assert server["tmpfs"] == ["/tmp"]
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]


def test_nothing_listens_beyond_this_machine_unless_it_is_asked_to() -> None:
    for service in services().values():
        for port in service["ports"]:
            assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:")


def test_mounted_files_exist_and_mounted_volumes_are_declared() -> None:
    volumes = load(DOCKER / "compose.yaml")["volumes"]
    for service in services().values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in volumes


def test_running_requests_may_finish_before_the_container_is_killed() -> None:
    grace_s = float(services()["server"]["stop_grace_period"].removesuffix("s"))

    assert grace_s > ServeSettings.model_fields["shutdown_timeout"].default


def test_every_variable_that_reaches_the_server_is_one_of_its_settings() -> None:
    known = {f"SORTSERVE_{name.upper()}" for name in ServeSettings.model_fields}
    variables = set(services()["server"]["environment"])

    assert {name for name in variables if name.startswith("SORTSERVE_")} <= known


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus() -> None:
    prometheus = load(DOCKER / "prometheus.yml")
    (source,) = load(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    (scrape,) = prometheus["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    host, port = target.split(":")

    assert scrape["job_name"] == "sortserve"
    assert host in services()
    assert f"EXPOSE {port}" in DOCKERFILES[0].read_text().splitlines()
    assert urlsplit(source["url"]).hostname in services()
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    for name in prometheus["rule_files"]:
        assert f"./{name}:/etc/prometheus/{name}:ro" in services()["prometheus"]["volumes"]


def test_grafana_finds_the_dashboard_where_it_is_mounted() -> None:
    (provider,) = load(DOCKER / "grafana/provisioning/dashboards/sortserve.yaml")["providers"]
    grafana = services()["grafana"]
    folder = provider["options"]["path"]

    assert f"./grafana/dashboards:{folder}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/{DASHBOARD.name}"


# Queries

KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
GROUPING = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)"
SELECTOR = r"\b(?P<name>[a-zA-Z_:][\w:]*)\b(?!\s*\()(?:\s*\{(?P<matchers>[^}]*)\})?"
MATCHER = r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"'


class Series(NamedTuple):
    """One sample's name and labels."""

    name: str
    labels: dict[str, str]


@cache
def exposed() -> tuple[Series, ...]:
    """What Prometheus knows of a server that has done a little of everything."""
    metrics = Metrics("tiny", [9, 30], version="0")
    metrics.watch(
        lambda: EngineStats(running_by_exit={9: 1}, kv_pages_total=8),
        lambda: AdmissionStats(pressure=0.5),
    )
    metrics.set_model_config({"backend": "reference", "failed_backends": "triton"})
    metrics.on_step(step_record())
    metrics.on_finished(report())
    metrics.on_rejected("queue_full", Budget(latency_ms=5))
    for status in (200, 404, 499, 503):
        metrics.http_request("/generate", "POST", status)
    metrics.keys.on_names(["team"])
    text = metrics.render()[0].decode()
    scraped = {"job": "sortserve", "instance": "server:8000"}
    series = [
        Series(sample.name, {**sample.labels, **scraped})
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    return (Series("up", scraped), *series)


def step_record() -> StepRecord:
    return StepRecord(
        duration_s=0.01,
        predicted_s=0.01,
        depth_cap=9,
        rows_by_exit={9: 1},
        tokens_by_exit={9: 1},
        layers_run=45,
        layers_full=150,
        exit_changes=((30, 9, "deadline"),),
    )


def report() -> RequestReport:
    return RequestReport(
        request_id="gen-1",
        budget=Budget(latency_ms=500),
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=4,
        num_cached_tokens=0,
        num_output_tokens=3,
        exit_layer=9,
        tokens_by_exit={9: 3},
        compute=0.4,
        predicted=Estimate(ttft_s=0.01, tpot_s=0.005, e2e_s=0.02),
        arrival_s=0.0,
        first_scheduled_s=0.001,
        first_token_s=0.01,
        last_token_s=0.02,
        finished_s=0.02,
    )


def selectors(query: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """(metric name, [(label, operator, value)]) of each selector of a PromQL expression."""
    query = re.sub(r"\[[^\]]*\]", "", re.sub(GROUPING, "", query))
    for match in re.finditer(SELECTOR, query):
        if match["name"] not in KEYWORDS:
            yield match["name"], re.findall(MATCHER, match["matchers"] or "")


def selects(series: Series, name: str, matchers: list[tuple[str, str, str]]) -> bool:
    def holds(label: str, operator: str, value: str) -> bool:
        found = series.labels.get(label)
        if found is None:
            return False  # a label that no series has is a typo, even in a negative matcher
        pattern = value if "~" in operator else re.escape(value)
        return bool(re.fullmatch(pattern, found)) is not operator.startswith("!")

    return series.name == name and all(holds(*matcher) for matcher in matchers)


def complaints(query: str) -> list[str]:
    """What is wrong with a query: selectors that select nothing, unknown grouping labels."""
    found = []
    labels: set[str] = set()
    for name, matchers in selectors(
        query.replace("$model_name", ".+").replace("$exit_layer", ".+")
    ):
        chosen = [series for series in exposed() if selects(series, name, matchers)]
        labels |= {label for series in chosen for label in series.labels}
        if not chosen:
            found.append(f"{name}{matchers} selects nothing")
    grouping = {
        label.strip() for group in re.findall(GROUPING, query) for label in group.split(",")
    }
    return found + [f"no series has the label {label}" for label in grouping - labels - {""}]


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load(DOCKER / "alerts.yml")["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_query_of_the_dashboard_selects_series_that_the_server_has(
    panel: dict[str, Any],
) -> None:
    for target in panel["targets"]:
        assert complaints(target["expr"]) == []


def test_the_dashboard_shows_every_series_of_the_server() -> None:
    """But for those that say what runs, which tables of other boards join."""
    shown = {name for p in panels() for t in p["targets"] for name, _ in selectors(t["expr"])}
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in shown}

    ours = {series.name for series in exposed() if series.name.startswith("sortserve_")}
    missing = {re.sub(r"_(bucket|sum|count|created|info)$", "", name) for name in ours} - families
    assert {name for name in missing if f"{name}_info" not in ours} == set(), missing


LABEL_VALUES = {"kind": 3, "reason": 4}
"""Most values of a label that a panel has lines of: a line each."""


@pytest.mark.parametrize(
    "panel",
    [panel for panel in panels() if panel["type"] == "timeseries"],
    ids=lambda panel: panel["title"],
)
def test_a_panel_has_at_most_four_lines(panel: dict[str, Any]) -> None:
    num_lines = 0
    for target in panel["targets"]:
        label = re.fullmatch(r"\{\{(\w+)\}\}", target["legendFormat"])
        num_lines += LABEL_VALUES[label[1]] if label else 1

    assert num_lines <= 4


def test_each_exit_has_a_row_of_its_own() -> None:
    [row] = [panel for panel in dashboard()["panels"] if panel.get("repeat")]

    assert row["repeat"] == "exit_layer"
    assert row["repeat"] in {variable["name"] for variable in dashboard()["templating"]["list"]}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_selects_series_that_the_server_has(rule: dict[str, Any]) -> None:
    assert complaints(rule["expr"]) == []
    assert {"summary", "action"} <= rule["annotations"].keys()


@pytest.mark.parametrize(
    "query",
    [
        "sum(rate(sortserve_nope_total[5m]))",
        "sortserv_num_requests_waiting > 0",
        'rate(sortserve_request_success_total{finished_reason="eror"}[5m])',
        'rate(sortserve_request_success_total{reason!="error"}[5m])',
        "sum by (exit) (rate(sortserve_generation_tokens_total[5m]))",
        "rate(sortserve_generation_tokens[5m]) and up",
        "histogram_quantile(0.5, rate(sortserve_step_duration_seconds_buckets[5m]))",
    ],
)
def test_a_query_with_a_typo_is_found(query: str) -> None:
    assert complaints(query) != []


def test_the_dashboard_lets_one_choose_the_data_source_and_the_model() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}

    assert variables["datasource"]["query"] == "prometheus"
    name, label = re.findall(r"\w+", variables["model_name"]["definition"])[1:]
    assert any(series.name == name and label in series.labels for series in exposed())
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert "sortserve_" not in target["expr"] or "$model_name" in target["expr"]


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    ids = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        ids.add(panel["id"])

    assert len(ids) == len(dashboard()["panels"])
