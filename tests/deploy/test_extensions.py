"""Objects of Kubernetes' extensions: of Ray, KServe, the Prometheus operator and gateways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from sortserve.process.arguments import Parser
from sortserve.process.config import load_settings
from sortserve.process.flags import add_flags
from support import charts
from support.charts import KUBERNETES, ROOT, TOOLS, Manifest, faults, of_kind, render
from support.kserve_models import MODELS, all_faults

DEPLOY = ROOT / "deploy"
CORE = "io.k8s.api.core.v1"
needs_kserve = pytest.mark.skipif(not MODELS.is_dir(), reason="no KServe here: make chart-tools")
needs_prometheus = pytest.mark.skipif(
    not (TOOLS / "cloudcoil").is_dir(), reason="no models of the operator: make chart-tools"
)


def sample(name: str, kind: str) -> Manifest:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    return of_kind(list(yaml.safe_load_all(text)), kind)


# KServe

KSERVE = {
    "ServingRuntime": ("kserve/servingruntime.yaml", "V1alpha1ServingRuntime"),
    "InferenceService": ("kserve/inferenceservice.yaml", "V1beta1InferenceService"),
}


@needs_kserve
@pytest.mark.parametrize("kind", KSERVE)
def test_kserve_knows_every_field(kind: str) -> None:
    name, model = KSERVE[kind]

    assert list(all_faults(sample(name, kind), model, kind)) == []


@needs_kserve
@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (["spec", "predicter"], {}, "has no field predicter"),
        (["spec", "predictor", "minReplicas"], "1", "'1' is no int"),
        (["spec", "predictor", "model", "storageURI"], "x", "has no field storageURI"),
        (["spec", "predictor", "securityContext", "runAs"], 1, "'runAs' was unexpected"),
    ],
)
def test_a_field_that_kserve_does_not_know_is_found(
    path: list[str], value: Any, fault: str
) -> None:
    manifest = sample(*KSERVE["InferenceService"][:1], "InferenceService")
    part = manifest
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value

    assert fault in str(list(all_faults(manifest, KSERVE["InferenceService"][1], "")))


def kserve_arguments() -> list[str]:
    runtime = sample("kserve/servingruntime.yaml", "ServingRuntime")["spec"]["containers"][0]
    service = sample("kserve/inferenceservice.yaml", "InferenceService")
    given = [*runtime["args"], *service["spec"]["predictor"]["model"]["args"]]
    return [word.replace("{{.Name}}", service["metadata"]["name"]) for word in given]


def test_the_server_takes_the_arguments_that_kserve_gives_it() -> None:
    parser = Parser()
    add_flags(parser)
    settings = load_settings(vars(parser.parse_args(kserve_arguments())))

    assert (settings.model, settings.port) == ("/mnt/models", 8080)
    assert settings.served_model_name == "sorted-smollm2"


def test_the_runtime_is_as_locked_down_as_the_chart_and_asks_the_same_routes() -> None:
    container = sample("kserve/servingruntime.yaml", "ServingRuntime")["spec"]["containers"][0]
    service = sample("kserve/inferenceservice.yaml", "InferenceService")["spec"]["predictor"]
    rights = container["securityContext"]

    assert (rights["readOnlyRootFilesystem"], rights["capabilities"]) == (True, {"drop": ["ALL"]})
    assert (rights["runAsNonRoot"], rights["allowPrivilegeEscalation"]) == (True, False)
    assert (service["automountServiceAccountToken"], service["enableServiceLinks"]) == (
        False,
        False,
    )
    routes = {k: container[k]["httpGet"] for k in container if k.endswith("Probe")}
    assert {k: v["path"] for k, v in routes.items()} == {
        "startupProbe": "/health",
        "readinessProbe": "/health",
        "livenessProbe": "/livez",
    }
    assert {v["port"] for v in routes.values()} == {8080}
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert service["terminationGracePeriodSeconds"] >= pause + 30 + 10


# The Prometheus operator


def monitoring_faults(manifests: list[Manifest]) -> str:
    search = os.pathsep.join([str(TOOLS), str(ROOT / "tests")])
    command = [sys.executable, "-m", "support.monitoring_models"]
    environment = os.environ | {"PYTHONPATH": search}
    given = json.dumps(manifests)
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@charts.needs_helm
@needs_prometheus
def test_the_prometheus_operator_knows_every_field_and_finds_a_wrong_one() -> None:
    values = {
        "tls": {"existingSecret": "t"},
        "serviceMonitor": {"enabled": True, "metricRelabelings": [{"action": "labeldrop"}]},
        "prometheusRule": {"enabled": True},
    }
    kinds = ("ServiceMonitor", "PrometheusRule")
    monitor, rule = (of_kind(render(values), kind) for kind in kinds)
    wrong = json.loads(json.dumps(monitor))
    wrong["spec"]["endpoints"][0]["interval_s"] = 15

    assert monitoring_faults([monitor, rule]) == ""
    assert monitoring_faults([wrong]).startswith("spec.endpoints.0.interval_s: Extra inputs")


# Ray


@charts.needs_helm
def test_the_pods_of_a_ray_cluster_serve_on_the_port_that_kuberay_looks_at() -> None:
    cluster = of_kind(render({"mode": "ray"}), "RayService")["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    (group,) = cluster["workerGroupSpecs"]
    worker = group["template"]["spec"]["containers"][0]

    assert {"name": "serve", "containerPort": 8000} in head["ports"]
    assert {"name": "serve", "containerPort": 8000} in worker["ports"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    # KubeRay's own probes need wget, which the image has not.
    for container in (head, worker):
        for kind in ("readinessProbe", "livenessProbe"):
            assert container[kind]["exec"]["command"][0] == "python"


RAY: list[tuple[Manifest, Manifest]] = [
    ({}, {"name": "engines", "num_replicas": 2, "max_replicas_per_node": 1}),
    (
        {"gpu": {"enabled": True, "count": 2}},
        {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1, "num_gpus": 2}},
    ),
    (
        {"ray": {"enableInTreeAutoscaling": True}},
        {
            "autoscaling_config": {
                "min_replicas": 2,
                "max_replicas": 4,
                "policy": {"policy_function": "sortserve.ray.scaling:replicas_by_pressure"},
            }
        },
    ),
    ({"ray": {"deployments": [{"name": "engines", "num_replicas": 7}]}}, {"num_replicas": 7}),
]


def serve_config(values: Manifest) -> Manifest:
    text = of_kind(render({"mode": "ray", **values}), "RayService")["spec"]["serveConfigV2"]
    config: Manifest = yaml.safe_load(text)
    return config


@charts.needs_helm
@pytest.mark.parametrize(("values", "options"), RAY)
def test_ray_runs_an_engine_on_each_worker(values: Manifest, options: Manifest) -> None:
    (application,) = serve_config(values)["applications"]

    assert application["import_path"] == "sortserve.ray:app"
    assert options.items() <= application["deployments"][0].items()


@charts.needs_helm
def test_ray_serve_takes_its_config() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs the extra `ray`")
    pytest.importorskip("sortserve.ray.scaling")  # which it loads
    for values, _ in RAY:
        schema.ServeDeploySchema.model_validate(serve_config(values))


# Gateways

NAME = {"type": "string", "pattern": "^[a-z0-9.-]+$"}
POOL: Manifest = {
    "type": "object",
    "additionalProperties": False,
    "required": ["targetPorts", "selector", "endpointPickerRef"],
    "properties": {
        "targetPorts": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 65535}},
            },
        },
        "selector": {
            "type": "object",
            "additionalProperties": False,
            "required": ["matchLabels"],
            "properties": {"matchLabels": {"type": "object"}},
        },
        "endpointPickerRef": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name", "port"],
            "properties": {
                "group": NAME,
                "kind": {"type": "string"},
                "name": NAME,
                "port": {"type": "object", "required": ["number"]},
                "failureMode": {"enum": ["FailOpen", "FailClose"]},
            },
        },
    },
}
"""``spec`` of an InferencePool v1, written by hand: no package registry has its definition."""


def test_the_pool_is_one_and_its_route_leads_there() -> None:
    pool = sample("gateway/inferencepool.yaml", "InferencePool")
    route = sample("gateway/inferencepool.yaml", "HTTPRoute")

    assert [e.message for e in Draft202012Validator(POOL).iter_errors(pool["spec"])] == []
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert backend["group"] == pool["apiVersion"].partition("/")[0]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])


@charts.needs_helm
def test_the_pool_finds_the_pods_of_the_chart_on_their_port() -> None:
    values = yaml.safe_load((DEPLOY / "gateway" / "values.yaml").read_text(encoding="utf-8"))
    manifests = render(values, name="prod")
    template = of_kind(manifests, "Deployment")["spec"]["template"]
    spec = sample("gateway/inferencepool.yaml", "InferencePool")["spec"]

    assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = [port["containerPort"] for port in template["spec"]["containers"][0]["ports"]]
    assert [port["number"] for port in spec["targetPorts"]] == ports
    config = yaml.safe_load(of_kind(manifests, "ConfigMap")["data"]["config.yaml"])
    assert config["vllm-metric-names"] is True


def test_samples_name_the_image_of_this_version(tmp_path: Path) -> None:
    from sortserve import __version__

    container = sample("kserve/servingruntime.yaml", "ServingRuntime")["spec"]["containers"][0]
    assert container["image"] == f"sortserve:{__version__}"
    if (TOOLS / "kubernetes_validate").is_dir():
        assert faults(container, KUBERNETES[0], f"{CORE}.Container") is None
