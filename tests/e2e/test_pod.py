"""The chart's pod, run as Kubernetes would run it: the manifest's user, mounts, variables, probes.

There is no cluster here. ``support/pods.py`` says what stands in for it, and what does not.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from sortserve.core.api_keys import key_digest
from sortserve_client import Client
from support import charts
from support.charts import of_kind, render
from support.pods import Container, needs_a_sandbox, running, sandbox, secret_folder
from support.tiny_models import make_tiny_checkpoint

pytestmark = [pytest.mark.slow, charts.needs_helm, needs_a_sandbox, pytest.mark.timeout(900)]
ENTRY_POINT = [sys.executable, "-m", "sortserve", "serve"]
"""Of the images: `sortserve serve`."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def keys_file(*keys: str) -> dict[str, str]:
    entries = [{"name": f"k{i}", "sha256": key_digest(key)} for i, key in enumerate(keys)]
    return {"keys.yaml": json.dumps({"keys": entries})}


def eventually(holds: Callable[[], bool], within_s: float, container: Container) -> None:
    """Asked as a probe asks, until it holds; fails with the container's log."""
    end = time.monotonic() + within_s
    while time.monotonic() < end and container.process.poll() is None:
        try:
            if holds():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(container.log.read_text(encoding="utf-8"))


class Pod:
    """The pod of the chart's Deployment, and what a kubelet would know of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        make_tiny_checkpoint(folder / "models" / "mine", exits=(2, 4, 6))
        values: dict[str, Any] = {
            "model": {"source": "pvc", "pvc": {"claimName": "models", "path": "mine"}},
            "auth": {"keys": {"existingSecret": "keys"}},
            "config": {
                "backend": "reference",
                "calibrate": False,
                "kv-cache-memory": "8MiB",
                "num-threads": 1,
                "vllm-metric-names": True,
            },
        }
        self.manifests = render(values)
        self.template = of_kind(self.manifests, "Deployment")["spec"]["template"]
        self.container = self.template["spec"]["containers"][0]
        config = of_kind(self.manifests, "ConfigMap")["data"]
        for name in ("config", "cache", "tmp"):
            (folder / name).mkdir()
        for name in ("cache", "tmp"):
            (folder / name).chmod(0o2777)  # as an emptyDir is
        (folder / "config" / "config.yaml").write_text(config["config.yaml"], encoding="utf-8")
        self.set_keys("first")

    def set_keys(self, *keys: str) -> None:
        """The Secret, and what the kubelet makes of it."""
        secret_folder(self.folder / "keys", keys_file(*keys), user=10001)

    @property
    def start_s(self) -> int:
        """What the startup probe allows; kernels are compiled in it, which images have."""
        probe = self.container["startupProbe"]
        return int(probe["periodSeconds"] * probe["failureThreshold"])

    def command(self, template: dict[str, Any], **environment: str) -> list[str]:
        """For a pod of the manifests: what gives it its view."""
        names = ("models", "config", "cache", "tmp", "keys")
        # Where this machine has what the image has installed.
        search = ":".join(str(charts.ROOT / part) for part in ("server", "client", "trainer"))
        here = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "PYTHONPATH": search}
        volumes = {name: self.folder / name for name in names}
        return sandbox(template, volumes, {**here, **environment})

    def start(self) -> Any:
        """Runs the server until the end of the block."""
        command = self.command(self.template, SORTSERVE_PORT=str(self.port))
        return running(
            command, [*ENTRY_POINT, *self.container.get("args", [])], self.folder / "log"
        )

    def probe(self, kind: str) -> bool:
        """Whether a probe of the manifest would pass now."""
        asked = self.container[kind]["httpGet"]
        assert asked["port"] == "http"
        url = f"{asked['scheme'].lower()}://127.0.0.1:{self.port}{asked['path']}"
        return (
            200 <= httpx.get(url, timeout=self.container[kind]["timeoutSeconds"]).status_code < 400
        )

    def status_of(self, key: str) -> int:
        """What a request with a key gets."""
        headers = {"Authorization": f"Bearer {key}"}
        body = {"prompt": "Hello", "max_tokens": 4}
        url = f"http://127.0.0.1:{self.port}/generate"
        return httpx.post(url, json=body, headers=headers, timeout=30).status_code


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    """One for all: a container that starts anew finds its volumes as they were."""
    folder = tmp_path_factory.mktemp("pod")
    for above in (folder, *folder.parents[:2]):
        above.chmod(0o755)
    return Pod(folder)


def test_a_pod_of_the_chart_starts_serves_takes_new_keys_and_drains(pod: Pod) -> None:
    grace_s = pod.template["spec"]["terminationGracePeriodSeconds"]
    with pod.start() as container:
        eventually(lambda: pod.probe("startupProbe"), pod.start_s, container)
        assert pod.probe("readinessProbe")
        assert pod.probe("livenessProbe")

        assert (pod.status_of("first"), pod.status_of("second")) == (200, 401)
        pod.set_keys("first", "second")
        eventually(lambda: pod.status_of("second") == 200, 30, container)

        metrics = httpx.get(f"http://127.0.0.1:{pod.port}/metrics").text
        assert re.search(r"^sortserve_pressure\{", metrics, re.MULTILINE)
        assert re.search(r"^vllm:num_requests_waiting\{", metrics, re.MULTILINE)

        with Client(f"http://127.0.0.1:{pod.port}", api_key="first") as client:
            stream = client.stream("Hello", max_tokens=200, ignore_eos=True)
            next(stream)
            code = container.terminate(grace_s)
            result = stream.result()
        assert (code, result.usage.completion_tokens) == (0, 200)

    log = container.log.read_text(encoding="utf-8")
    assert "Read-only file system" not in log
    assert "no cache" not in log
    assert (pod.folder / "cache" / "sortserve").stat().st_uid == 10001
    assert (pod.folder / "cache" / "sortserve").stat().st_mode & 0o077 == 0


def test_nothing_but_its_volumes_can_be_written_to(pod: Pod) -> None:
    """Else the test above would prove nothing."""
    script = "touch /data/x /tmp/x; touch /x /etc/x /usr/x /models/x /etc/sortserve/config/x; id -u"
    with running(pod.command(pod.template), ["sh", "-c", script], pod.folder / "log") as container:
        container.process.wait(60)

    log = container.log.read_text(encoding="utf-8")
    assert log.count("cannot touch") == 5, log
    assert log.endswith("10001\n")


def test_helms_own_test_passes_on_a_server_that_asks_for_keys(pod: Pod) -> None:
    test = of_kind(pod.manifests, "Pod")
    script = test["spec"]["containers"][0]["command"][2]
    url = f"http://127.0.0.1:{pod.port}"
    with pod.start() as server:
        eventually(lambda: pod.probe("startupProbe"), pod.start_s, server)
        sandboxed = pod.command(test, URL=url)
        with running(sandboxed, [sys.executable, "-c", script], pod.folder / "test") as asking:
            assert asking.process.wait(120) == 0, asking.log.read_text(encoding="utf-8")
        assert "keys are asked for" in asking.log.read_text(encoding="utf-8")
        sandboxed = pod.command(test, URL=f"{url}/nowhere")
        with running(sandboxed, [sys.executable, "-c", script], pod.folder / "test") as asking:
            assert asking.process.wait(120) != 0
