"""The files in ``docker/`` cannot be run in a test, so every promise they make is read off them.

Every query of the dashboard and of the alerts is held against the series that a real ``Metrics``
exposes after a synthetic run: each selector must select something.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
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

# Dockerfiles


class Instruction(NamedTuple):
    """``name`` in capitals, and the rest of the (joined) line."""

    name: str
    rest: str


def instructions(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    parts = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [Instruction(name.upper(), rest.strip()) for name, rest in parts]


def final_stage(path: Path) -> dict[str, list[str]]:
    """Arguments of the last stage's instructions, by name."""
    stage: dict[str, list[str]] = {}
    for name, rest in instructions(path):
        if name == "FROM":
            stage = {}
        stage.setdefault(name, []).append(rest)
    return stage


def environment(stage: dict[str, list[str]]) -> dict[str, str]:
    pairs = [pair for line in stage.get("ENV", []) for pair in shlex.split(line)]
    return dict(pair.split("=", 1) for pair in pairs)


def base_images(path: Path) -> list[str]:
    """Base images with the defaults of build arguments filled in."""
    arguments: dict[str, str] = {}
    images = []
    for name, rest in instructions(path):
        if name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif name == "FROM":
            image = rest.split()[0]
            images.append(re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], image))
    return images


each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


@each_dockerfile
def test_the_image_is_built_in_one_stage_and_runs_in_another(path: Path) -> None:
    stages = [rest.split()[-1] for name, rest in instructions(path) if name == "FROM"]

    assert stages == ["builder", "runtime"]
    assert final_stage(path)["COPY"] == ["--from=builder /opt/venv /opt/venv"]


@each_dockerfile
def test_base_images_have_a_tag_that_is_not_latest(path: Path) -> None:
    for image in base_images(path):
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image), image


@each_dockerfile
def test_the_image_does_not_run_as_root(path: Path) -> None:
    stage = final_stage(path)

    assert stage["USER"] == ["10001:10001"]
    assert any("--owner=10001 --group=10001 /data" in run for run in stage["RUN"])


@each_dockerfile
def test_the_server_is_process_one_and_gets_the_signal_that_drains_it(path: Path) -> None:
    stage = final_stage(path)

    assert json.loads(stage["ENTRYPOINT"][0]) == ["sortserve", "serve"]
    assert stage["STOPSIGNAL"] == ["SIGTERM"]
    assert stage["EXPOSE"] == ["8000"]


@each_dockerfile
def test_checkpoints_and_converted_weights_outlive_the_container(path: Path) -> None:
    stage = final_stage(path)
    (volume,) = json.loads(stage["VOLUME"][0])

    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        assert environment(stage)[variable].startswith(f"{volume}/")


def test_the_cuda_image_has_what_triton_compiles_with_and_keeps_what_it_compiled() -> None:
    path = next(path for path in DOCKERFILES if path.name == "Dockerfile.cuda")
    stage = final_stage(path)

    assert 'python -c "import triton"' in [
        rest for name, rest in instructions(path) if name == "RUN"
    ]
    assert any("g++" in run and "python3-dev" in run for run in stage["RUN"])
    assert environment(stage)["TRITON_CACHE_DIR"].startswith("/data/")


def test_the_cpu_image_has_kernels_for_every_processor_and_no_compiler() -> None:
    path = next(path for path in DOCKERFILES if path.name == "Dockerfile.cpu")
    compiles = [rest for name, rest in instructions(path) if "sortserve kernels --isa all" in rest]

    assert len(compiles) == 1
    assert not any("g++" in run for run in final_stage(path).get("RUN", []))


@each_dockerfile
def test_the_package_lists_are_not_kept(path: Path) -> None:
    for name, rest in instructions(path):
        if name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert rest.endswith("rm -rf /var/lib/apt/lists/*")


@each_dockerfile
def test_torch_is_in_the_range_that_the_package_asks_for(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [d for d in project["optional-dependencies"]["server"] if d.startswith("torch")]
    defaults = [rest for name, rest in instructions(path) if name == "ARG"]

    assert f'TORCH_VERSION="{wanted.removeprefix("torch")}"' in defaults


@each_dockerfile
def test_what_the_build_copies_exists_and_is_let_through(path: Path) -> None:
    ignore = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    copied = [
        source
        for name, rest in instructions(path)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]

    assert "*" in ignore
    assert {f"!{source.removeprefix('./')}" for source in copied} == {
        line for line in ignore if line.startswith("!")
    }
    for source in copied:
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
@each_dockerfile
def test_the_health_check_asks_the_server_itself(path: Path, status: int, healthy: bool) -> None:
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    command = json.loads(final_stage(path)["HEALTHCHECK"][0].split("CMD", 1)[1])
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        done = subprocess.run(
            [sys.executable, *command[1:]],
            env={"SORTSERVE_PORT": str(server.server_port)},
            capture_output=True,
            check=False,
        )
        thread.join()

    assert asked == ["/health"]
    assert (done.returncode == 0) is healthy


HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@each_dockerfile
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    assert HADOLINT is not None
    command = [HADOLINT, "--config", str(DOCKER / "hadolint.yaml"), str(path)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout == ""
    assert done.returncode == 0


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
        built = service.get("build", {}).get("dockerfile")
        own = service.get("healthcheck", {}).get("test")
        assert own or (built and "HEALTHCHECK" in final_stage(ROOT / built)), name


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
    for path in DOCKERFILES:
        variables |= set(environment(final_stage(path)))

    assert {name for name in variables if name.startswith("SORTSERVE_")} <= known


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus() -> None:
    prometheus = load(DOCKER / "prometheus.yml")
    (source,) = load(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    (scrape,) = prometheus["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    host, port = target.split(":")

    assert scrape["job_name"] == "sortserve"
    assert host in services()
    assert [port] == final_stage(DOCKERFILES[0])["EXPOSE"]
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
