"""The images that the chart asks for are those that docs/kubernetes.md says how to build."""

from __future__ import annotations

import itertools
import re
import shlex
from typing import Any

import pytest

from sortserve import __version__
from support.charts import ROOT, needs_helm, pod_templates, render

pytestmark = needs_helm
REPOSITORY = "registry.example/sortserve"


def built() -> dict[str, tuple[str, set[str]]]:
    """The page's builds: by tag the Dockerfile and the extras."""
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    found = {}
    for line in re.findall(r"^docker build .*", page, re.MULTILINE):
        words = shlex.split(line)
        given = dict(itertools.pairwise(words))
        name, _, value = given.get("--build-arg", "EXTRAS=").partition("=")
        assert name == "EXTRAS"
        found[given["-t"]] = (given["-f"], set(value.split()))
    return found


@pytest.mark.parametrize("mode", ["deployment", "ray"])
@pytest.mark.parametrize("has_gpus", [False, True])
def test_every_pod_has_an_image_that_the_page_builds(mode: str, has_gpus: bool) -> None:
    values: dict[str, Any] = {"mode": mode, "gpu": {"enabled": has_gpus}}
    manifests = render({**values, "image": {"repository": REPOSITORY}})
    containers = [c for pod in pod_templates(manifests) for c in pod["spec"]["containers"]]

    assert containers
    for container in containers:
        dockerfile, extras = built()[container["image"]]
        assert dockerfile == f"docker/Dockerfile.{'cuda' if has_gpus else 'cpu'}"
        assert extras == ({"ray"} if mode == "ray" else set())


def test_the_page_builds_the_version_of_the_chart() -> None:
    assert {tag.rpartition(":")[2].partition("-")[0] for tag in built()} == {__version__}
