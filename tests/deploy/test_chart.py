"""The Helm chart, rendered by Helm's own engine and held against Kubernetes' own schemas.

What no cluster is needed for: which objects there are and that they fit together, that the server
takes what its pods are given, and that wrong values are refused in words that help.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sortserve import __version__
from sortserve.process.api_keys import parse_keys
from sortserve.process.config import ServeSettings, load_settings
from support import charts
from support.charts import CHART, Manifest, faults, of_kind, pod_templates, render, render_text

pytestmark = charts.needs_helm
POD = "io.k8s.api.core.v1.PodTemplateSpec"
KEY: dict[str, Any] = {
    "name": "alice",
    "sha256": "ab" * 32,
    "requests_per_minute": 60,
    "max_exit_layer": 18,
}

EVERYTHING: dict[str, Any] = {
    "replicaCount": 3,
    "commonLabels": {"team": "ml"},
    "image": {"repository": "registry.example/llm", "digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "model": {
        "source": "pull",
        "pull": {"repo": "me/mine", "revision": "main", "tokenSecret": {"name": "hf"}},
    },
    "config": {
        "exits": [9, 18, 30],
        "max-num-seqs": 64,
        "max-num-queued-tokens": 1_000_000,
        "kv-cache-memory": "2GiB",
        "shutdown-timeout": 60.5,
        "default-budget": '{"min_quality": 0.8}',
        "vllm-metric-names": True,
    },
    "auth": {"keys": {"inline": [KEY]}, "apiKey": {"existingSecret": "plain"}},
    "tls": {"existingSecret": "certificate"},
    "gpu": {"enabled": True, "count": 2},
    "cache": {"existingClaim": "cache"},
    "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "hosts": [{"host": "llm.example"}],
        "tls": [{"hosts": ["llm.example"], "secretName": "web"}],
    },
    "autoscaling": {
        "enabled": True,
        "extraMetrics": [
            {
                "type": "Resource",
                "resource": {
                    "name": "cpu",
                    "target": {"type": "Utilization", "averageUtilization": 90},
                },
            }
        ],
    },
    "podDisruptionBudget": {"minAvailable": "50%"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "networkPolicy": {
        "from": [{"namespaceSelector": {"matchLabels": {"app": "web"}}}],
        "monitoring": [{"namespaceSelector": {"matchLabels": {"app": "prometheus"}}}],
        "egress": [{"ports": [{"port": 4318, "protocol": "TCP"}]}],
    },
    "serviceAccount": {"annotations": {"a": "b"}},
    "podLabels": {"inference": "yes"},
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {}},
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
        }
    ],
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "extraEnv": [{"name": "OTEL_SERVICE_NAME", "value": "llm"}],
    "extraEnvFrom": [{"configMapRef": {"name": "more"}}],
    "extraArgs": ["--debug"],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "extraInitContainers": [{"name": "first", "image": "busybox:1.37", "command": ["true"]}],
    "extraContainers": [{"name": "beside", "image": "busybox:1.37"}],
    "extraObjects": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}}
    ],
}
RAY: dict[str, Any] = {
    "mode": "ray",
    "auth": {"keys": {"existingSecret": "keys"}},
}
MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "gpu": {"gpu": {"enabled": True}},
    "claim": {"model": {"source": "pvc", "pvc": {"claimName": "models", "path": "mine/v2"}}},
    "keys": {"auth": {"keys": {"existingSecret": "keys", "secretKey": "k.yaml"}}},
    "bare": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "serviceAccount": {"create": False},
        "tests": {"enabled": False},
        "preStopSeconds": 0,
    },
    "ray": RAY,
    "ray with everything": {
        **{k: v for k, v in EVERYTHING.items() if k not in {"autoscaling", "tls", "extraArgs"}},
        **RAY,
        "auth": EVERYTHING["auth"],
        "ray": {"enableInTreeAutoscaling": True, "worker": {"minReplicas": 1, "maxReplicas": 9}},
    },
}
each = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)


def server_of(manifests: list[Manifest]) -> Manifest:
    """The container that serves."""
    spec = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    container: Manifest = spec["containers"][0]
    return container


def settings_of(
    manifests: list[Manifest], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ServeSettings:
    """What the server makes of the environment and the file of its pod."""
    text = of_kind([m for m in manifests if "config.yaml" in m.get("data", {})], "ConfigMap")
    (folder / "config.yaml").write_text(text["data"]["config.yaml"], encoding="utf-8")
    template = next(t for t in pod_templates(manifests) if t.get("kind") != "Pod")
    for variable in template["spec"]["containers"][0]["env"]:
        value = variable.get("value", "a-key")
        monkeypatch.setenv(variable["name"], value)
    monkeypatch.setenv("SORTSERVE_CONFIG", str(folder / "config.yaml"))
    for name in ("SSL_CERTFILE", "SSL_KEYFILE", "API_KEYS_FILE"):
        monkeypatch.delenv(f"SORTSERVE_{name}", raising=False)
    return load_settings()


# Rendered as it should be


@each
def test_helm_lint_has_nothing_to_say(values: dict[str, Any]) -> None:
    assert charts.lint(values) == []


@pytest.mark.parametrize("version", charts.KUBERNETES)
@each
def test_kubernetes_knows_every_field(values: dict[str, Any], version: str) -> None:
    manifests = render(values)

    assert [faults(m, version) for m in manifests if charts.is_known(m)] == [
        None for m in manifests if charts.is_known(m)
    ]
    for template in pod_templates(manifests):
        pod = {"metadata": template["metadata"], "spec": template["spec"]}
        assert faults(pod, version, POD) is None


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    manifest = of_kind(render({}), "Deployment")
    manifest["spec"]["template"]["spec"]["contaners"] = []

    assert "contaners" in str(faults(manifest, charts.KUBERNETES[0]))


@each
def test_no_name_is_too_long_and_none_comes_twice(values: dict[str, Any]) -> None:
    manifests = render(values, name="a-release-name-of-fifty-three-characters-at-the-most-")

    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)
    assert max(len(name) for _, name in names) <= 63
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) for _, name in names)


@each
@pytest.mark.parametrize("word", ["2024", "1e3", "on", "no", "0x1f"])
def test_no_name_is_taken_for_a_number_or_a_truth(values: dict[str, Any], word: str) -> None:
    """Releases and namespaces may be called so, which YAML reads as another type unless quoted."""
    told = {**values, "fullnameOverride": "on", "serviceAccount": {"name": word}}
    for manifest in render(told, name=word, namespace=word):
        assert [*values_that_are_no_text(manifest)] == []


def values_that_are_no_text(part: Any, path: str = "") -> Iterator[str]:
    """Of the fields that hold names and labels."""
    if isinstance(part, dict):
        for key, value in part.items():
            is_text = key in {"name", "serviceAccountName"} or path.endswith("abels")
            if is_text and not isinstance(value, str | dict | list):
                yield f"{path}/{key}: {value!r}"
            yield from values_that_are_no_text(value, f"{path}/{key}")
    elif isinstance(part, list):
        for value in part:
            if path.endswith("/matchNames") and not isinstance(value, str):
                yield f"{path}: {value!r}"
            yield from values_that_are_no_text(value, path)


@pytest.mark.parametrize("name", ["2024", "a.b"])
def test_a_release_whose_service_could_not_be_called_so_is_refused(name: str) -> None:
    with pytest.raises(charts.HelmError, match="give another as fullnameOverride"):
        render({}, name=name)


@each
def test_volumes_that_are_mounted_are_there_and_the_other_way_round(values: dict[str, Any]) -> None:
    for template in pod_templates(render(values)):
        spec = template["spec"]
        containers = [*spec["containers"], *spec.get("initContainers", [])]
        mounted = {m["name"] for c in containers for m in c.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in spec.get("volumes", [])}


@each
def test_selectors_find_the_pods_that_serve_and_not_the_test(values: dict[str, Any]) -> None:
    manifests = render(values)
    pods = [t["metadata"]["labels"] for t in pod_templates(manifests)]
    serving = [p for p in pods if p["app.kubernetes.io/component"] in {"server", "worker"}]

    def found(selector: Manifest) -> list[Manifest]:
        return [pod for pod in pods if selector.items() <= pod.items()]

    if values.get("mode") != "ray":
        assert found(of_kind(manifests, "Service")["spec"]["selector"]) == serving
        assert found(of_kind(manifests, "Deployment")["spec"]["selector"]["matchLabels"]) == serving
    for manifest in manifests:
        if manifest["kind"] == "PodDisruptionBudget":
            assert found(manifest["spec"]["selector"]["matchLabels"]) == serving
        if manifest["kind"] == "NetworkPolicy":
            assert found(manifest["spec"]["podSelector"]["matchLabels"]) == pods
        if manifest["kind"] == "ServiceMonitor":
            labels = of_kind(manifests, "Service")["metadata"]["labels"]
            assert manifest["spec"]["selector"]["matchLabels"].items() <= labels.items()


# Secure by default


@each
def test_every_container_of_ours_is_locked_down(values: dict[str, Any]) -> None:
    for template in pod_templates(render(values)):
        spec = template["spec"]
        pod = spec["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"]) == (True, 10001)
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        is_autoscaled_head = values.get("ray", {}).get("enableInTreeAutoscaling") and (
            template["metadata"]["labels"]["app.kubernetes.io/component"] == "head"
        )
        assert spec["automountServiceAccountToken"] is bool(is_autoscaled_head)
        assert spec["enableServiceLinks"] is False
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            if container["name"] in {"first", "beside"}:  # not ours
                continue
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "privileged": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= container["resources"].keys()


def test_no_secret_is_in_the_environment_or_in_a_config_map() -> None:
    manifests = render(EVERYTHING)
    environment = {v["name"]: v for v in server_of(manifests)["env"]}

    assert environment["SORTSERVE_API_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "plain"
    assert KEY["sha256"] not in json.dumps(of_kind(manifests, "Deployment"))
    assert KEY["sha256"] in of_kind(manifests, "Secret")["stringData"]["keys.yaml"]


def test_only_named_peers_and_the_releases_own_pods_reach_the_port() -> None:
    spec = of_kind(render(EVERYTHING), "NetworkPolicy")["spec"]

    (rule,) = spec["ingress"]
    assert [port["port"] for port in rule["ports"]] == [8000]
    assert [list(peer) for peer in rule["from"]] == [
        ["podSelector"],
        ["namespaceSelector"],
        ["namespaceSelector"],
    ]


@pytest.mark.parametrize(
    ("values", "ports"),
    [
        ({}, {53}),
        ({"model": {"source": "pull", "pull": {"repo": "a/b"}}}, {53, 443}),
        ({"networkPolicy": {"egress": [{"ports": [{"port": 4318}]}]}}, {53, 4318}),
        ({"mode": "ray", "ray": {"enableInTreeAutoscaling": True}}, {53, 443, 6443}),
    ],
)
def test_what_goes_out_is_dns_and_what_the_model_needs(
    values: dict[str, Any], ports: set[int]
) -> None:
    rules = of_kind(render(values), "NetworkPolicy")["spec"]["egress"]

    assert {port["port"] for rule in rules for port in rule.get("ports", [])} == ports
    unbounded = [rule for rule in rules if "ports" not in rule]
    assert all("podSelector" in peer for rule in unbounded for peer in rule["to"])


def test_the_dashboard_of_ray_is_open_to_its_operator_alone() -> None:
    rules = of_kind(render(RAY), "NetworkPolicy")["spec"]["ingress"]

    (rule,) = (r for r in rules if {"port": 8265, "protocol": "TCP"} in r.get("ports", []))
    labels = {"kubernetes.io/metadata.name": "kuberay-operator"}
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": labels}}]


# The server takes what it is given


@each
def test_the_server_takes_the_settings_of_its_pod(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(render(values), tmp_path, monkeypatch)

    assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    assert settings.log_format == "json"
    given = values.get("config", {})
    assert settings.max_num_queued_tokens == given.get("max-num-queued-tokens", 200_000)
    assert settings.shutdown_timeout == given.get("shutdown-timeout", 30)
    assert settings.tensor_parallel_size == values.get("gpu", {}).get("count", 1)


@pytest.mark.parametrize(
    ("model", "served"),
    [
        ({}, "sorted-smollm2-135m"),
        ({"name": "me/mine"}, "me/mine"),
        ({"source": "pvc", "pvc": {"claimName": "c"}}, "/models"),
        ({"source": "pvc", "pvc": {"claimName": "c", "path": "a/b"}}, "/models/a/b"),
        ({"source": "pull", "pull": {"repo": "me/mine"}}, "/models/checkpoint"),
    ],
)
def test_the_model_is_where_it_was_put(
    model: dict[str, Any], served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = render({"model": model})

    assert settings_of(manifests, tmp_path, monkeypatch).model == served
    mounts = {m["mountPath"] for m in server_of(manifests)["volumeMounts"]}
    assert ("/models" in mounts) == served.startswith("/models")


def test_a_download_goes_where_the_server_looks_and_the_server_stays_offline() -> None:
    spec = of_kind(render(EVERYTHING), "Deployment")["spec"]["template"]["spec"]
    (pull,) = (c for c in spec["initContainers"] if c["name"] == "pull-model")
    environment = {v["name"]: v.get("value") for v in spec["containers"][0]["env"]}

    folder = pull["command"][pull["command"].index("--local-dir") + 1]
    assert pull["command"][:3] == ["hf", "download", "me/mine"]
    assert folder == environment["SORTSERVE_MODEL"]
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_the_server_takes_the_keys_that_the_chart_writes() -> None:
    text = of_kind(render(EVERYTHING), "Secret")["stringData"]["keys.yaml"]

    (policy,) = parse_keys(text, "the Secret", base=1.1)
    assert (policy.name, policy.max_exit_layer) == ("alice", 18)


def test_keys_are_mounted_as_a_folder_so_that_a_change_arrives() -> None:
    manifests = render(MATRIX["keys"])
    (mount,) = (m for m in server_of(manifests)["volumeMounts"] if m["name"] == "keys")
    spec = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    (volume,) = (v for v in spec["volumes"] if v["name"] == "keys")
    (path,) = (v["value"] for v in server_of(manifests)["env"] if "KEYS_FILE" in v["name"])

    assert "subPath" not in mount
    (item,) = volume["secret"]["items"]
    assert f"{mount['mountPath']}/{item['path']}" == path
    assert item["key"] == "k.yaml"


def test_the_cache_is_a_folder_that_the_server_makes_itself() -> None:
    """An emptyDir may be written to by all, and is not trusted: docs/operations.md."""
    container = server_of(render({}))
    environment = {v["name"]: v["value"] for v in container["env"]}
    mounts = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}

    assert mounts == {"/data", "/tmp"}
    assert environment["SORTSERVE_CACHE_SIZE"] == "10GiB"  # below the limit of the emptyDir
    assert Path(environment["SORTSERVE_CACHE_DIR"]).parent == Path("/data")
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HOME"):
        assert any(Path(environment[name]).is_relative_to(mount) for mount in mounts), name


# Probes and ends


def test_probes_ask_the_routes_that_answer_them() -> None:
    container = server_of(render({}))
    routes = {k: container[k]["httpGet"]["path"] for k in container if k.endswith("Probe")}

    assert routes == {
        "startupProbe": "/health",
        "readinessProbe": "/health",
        "livenessProbe": "/livez",
    }
    assert container["ports"] == [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]


def test_probes_speak_tls_if_the_server_does() -> None:
    container = server_of(render({"tls": {"existingSecret": "c"}}))

    assert {container[k]["httpGet"]["scheme"] for k in container if k.endswith("Probe")} == {
        "HTTPS"
    }


@pytest.mark.parametrize(
    ("values", "grace"),
    [
        ({}, 5 + 30 + 15),
        ({"config": {"shutdown-timeout": 120.5}}, 5 + 121 + 15),
        ({"preStopSeconds": 20}, 20 + 30 + 15),
        ({"terminationGracePeriodSeconds": 300}, 300),
    ],
)
def test_a_pod_has_time_to_end_its_requests(values: dict[str, Any], grace: int) -> None:
    """``preStop`` + ``--shutdown-timeout`` + 10 at least: docs/operations.md."""
    spec = of_kind(render(values), "Deployment")["spec"]["template"]["spec"]

    assert spec["terminationGracePeriodSeconds"] == grace


def test_a_pod_serves_on_while_it_is_taken_off_the_endpoints() -> None:
    assert server_of(render({}))["lifecycle"] == {"preStop": {"sleep": {"seconds": 5}}}


# Devices, scale, metrics


def test_gpus_are_asked_for_and_shared_out() -> None:
    manifests = render({"gpu": {"enabled": True, "count": 4}})
    container = server_of(manifests)
    environment = {v["name"]: v["value"] for v in container["env"]}

    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert environment["SORTSERVE_TENSOR_PARALLEL_SIZE"] == "4"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["image"] == f"sortserve:{__version__}-cuda"


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ({}, f"sortserve:{__version__}"),
        ({"image": {"tag": "nightly"}}, "sortserve:nightly"),
        ({"image": {"repository": "r.example/s", "digest": "sha256:" + "a" * 64}},
         "r.example/s@sha256:" + "a" * 64),
    ],
)  # fmt: skip
def test_the_image_is_that_of_the_charts_version_unless_named(
    values: dict[str, Any], image: str
) -> None:
    assert server_of(render(values))["image"] == image


def test_the_autoscaler_reads_series_that_the_server_has() -> None:
    manifests = render({"autoscaling": {"enabled": True, "targetPressure": 0.85}})
    page = (charts.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    metrics = [m["pods"] for m in of_kind(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]]

    assert [m["target"]["averageValue"] for m in metrics] == ["850m", "4000m"]
    for metric in metrics:
        assert f"`{metric['metric']['name'].removeprefix('sortserve_')}` | gauge" in page
    assert "replicas" not in of_kind(manifests, "Deployment")["spec"]


def test_somebody_else_may_scale() -> None:
    assert "replicas" not in of_kind(render({"replicaCount": None}), "Deployment")["spec"]


def test_the_alerts_are_those_that_the_server_is_tested_against() -> None:
    source = (charts.ROOT / "docker" / "alerts.yml").read_text(encoding="utf-8")
    manifests = render({"prometheusRule": {"enabled": True}, "nameOverride": "llm"})
    rules = of_kind(manifests, "PrometheusRule")["spec"]

    copy = (CHART / "files" / "alerts.yml").read_text(encoding="utf-8")
    assert copy == source, "cp docker/alerts.yml deploy/helm/sortserve/files/"
    expected = yaml.safe_load(
        source.replace('job="sortserve"', r"job=\"llm\", namespace=\"llm\"").replace(r"\"", '"')
    )
    assert rules == expected


# Wrong values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "statefulset"}, "'/mode': value must be one of 'deployment', 'ray'"),
        ({"replicas": 2}, "additional properties 'replicas' not allowed"),
        ({"image": {"tags": "x"}}, "'/image': additional properties 'tags' not allowed"),
        ({"config": {"max-num-seq": 3}}, "additional properties 'max-num-seq' not allowed"),
        ({"config": {"port": 8001}}, "additional properties 'port' not allowed"),
        ({"config": {"max-num-seqs": 0}}, "'/config/max-num-seqs': minimum: got 0, want 1"),
        ({"config": {"policy": "edf"}}, "must be one of 'deadline', 'fair', 'lockstep'"),
        ({"config": {"min-quality": 2}}, "'/config/min-quality': maximum: got 2, want 1"),
        ({"resources": {"limits": {"memory": "3 GB"}}}, "'/resources/limits/memory'"),
        ({"replicaCount": "3"}, "'/replicaCount': got string"),
        ({"auth": {"keys": {"inline": [{"name": "a", "sha256": "short"}]}}}, "/inline/0/sha256"),
        ({"auth": {"keys": {"inline": [{"name": "a"}]}}}, "missing property 'sha256'"),
        ({"model": {"pvc": {"path": "../etc"}}}, "'/model/pvc/path'"),
        ({"model": {"source": "pvc"}}, "model.pvc.claimName must name the claim"),
        ({"model": {"source": "pull"}}, "model.pull.repo must name a Hugging Face id"),
        (
            {"model": {"source": "pvc", "name": "x", "pvc": {"claimName": "c"}}},
            "model.name is for model.source baked only",
        ),
        (
            {"auth": {"keys": {"existingSecret": "s", "inline": [KEY]}}},
            "exclude each other",
        ),
        (
            {"terminationGracePeriodSeconds": 30},
            "is 30, and must be at least preStopSeconds + shutdown-timeout + 10 = 45",
        ),
        ({"autoscaling": {"enabled": True, "minReplicas": 9}}, "minReplicas (9) must not be above"),
        (
            {"autoscaling": {"enabled": True, "targetPressure": 0, "targetWaiting": 0}},
            "autoscaling needs a metric",
        ),
        ({"ingress": {"enabled": True}}, "ingress.hosts must have an entry"),
        ({"podDisruptionBudget": {"maxUnavailable": None}}, "needs minAvailable or maxUnavailable"),
        ({"mode": "ray", "autoscaling": {"enabled": True}}, "in mode ray, Ray scales"),
        ({"mode": "ray", "tls": {"existingSecret": "t"}}, "Ray Serve speaks plain HTTP"),
        ({"mode": "ray", "extraArgs": ["--debug"]}, "extraArgs is for mode deployment"),
        (
            {"mode": "ray", "ray": {"worker": {"maxReplicas": 1}}},
            "(2) <= maxReplicas (1) must hold",
        ),
    ],
)
def test_wrong_values_are_refused_in_words_that_help(values: dict[str, Any], message: str) -> None:
    with pytest.raises(charts.HelmError, match=re.escape(message)):
        render(values)


def test_every_object_of_the_schema_is_closed_but_those_of_kubernetes() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))

    def open_ones(part: Any, path: str = "") -> list[str]:
        if isinstance(part, list):
            return [o for item in part for o in open_ones(item, path)]
        if not isinstance(part, dict):
            return []
        here = [path] if part.get("type") == "object" and "additionalProperties" not in part else []
        return here + [o for key, value in part.items() for o in open_ones(value, f"{path}/{key}")]

    known = {path.replace("/properties", "").replace("/items", "[]") for path in open_ones(schema)}
    assert known == {
        "/affinity",
        "/autoscaling/behavior",
        "/autoscaling/extraMetrics[]",
        "/extraContainers[]",
        "/extraEnv[]/valueFrom",
        "/extraEnvFrom[]",
        "/extraInitContainers[]",
        "/extraObjects[]",
        "/extraVolumeMounts[]",
        "/extraVolumes[]",
        "/global",
        "/model/pull/env[]/valueFrom",
        "/model/pull/resources/claims[]",
        "/networkPolicy/egress[]",
        "/networkPolicy/from[]",
        "/networkPolicy/monitoring[]",
        "/podSecurityContext",
        "/ray/deployments[]",
        "/ray/head/resources/claims[]",
        "/resources/claims[]",
        "/securityContext",
        "/serviceMonitor/metricRelabelings[]",
        "/tolerations[]",
        "/topologySpreadConstraints[]",
        "/updateStrategy/rollingUpdate",
    }


# Notes and the chart itself


def test_the_notes_say_what_is_open() -> None:
    assert "There are no API keys" in render_text({})["templates/NOTES.txt"]
    notes = render_text({"auth": {"apiKey": {"existingSecret": "k"}}})["templates/NOTES.txt"]
    assert "There are no API keys" not in notes
    assert "Authorization: Bearer $KEY" in notes


def test_the_charts_version_of_the_server_is_the_servers() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))

    assert chart["appVersion"] == __version__
