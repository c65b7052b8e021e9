"""The steps of the Dockerfiles, carried out in roots of Debian; then a server in the result.

There is no Docker engine in this: ``support.image_build`` runs each step in a chroot, and
``support.container`` starts the server as the image's user, with a read-only root, no privileges
and no network. What differs from a real build:

* ``debian:12-slim`` is what debootstrap makes of the same packages. The base of the CUDA image
  cannot be had here: Debian stands in for it, its drivers and its Python.
* Where a folder of wheels has torch for CPUs (``PIP_FIND_LINKS``), that is taken, and PyTorch's own
  index is not asked. Of the CUDA image torch for CPUs is installed, too: a build for CUDA is
  gigabytes, and needs a GPU to say more than that it is there.

It takes root, debootstrap, a package index and a quarter of an hour. ``SORTSERVE_TEST_IMAGES``
names a folder that keeps the stages for the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sortserve.model.backends.cpu.isa import ISAS
from support.container import Container, running
from support.dockerfiles import Dockerfile, read_dockerfile
from support.image_build import Image, ImageBuilder, chroot_command, debian_root

pytest.importorskip("dockerfile_parse", reason="needs the extra `dev`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, for chroot and mounts"
    ),
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in ("debootstrap", "unshare", "nsenter")),
        reason="needs debootstrap, unshare and nsenter",
    ),
]

ROOT = Path(__file__).parents[2]
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "clang++", "as", "ld", "tcc")
SHALLOW = {"prompt": "Gravity is", "max_tokens": 8, "temperature": 0, "budget": {"exit_layer": 24}}
ASK = (
    "import json, sys, urllib.request as r; "
    "q = r.Request('http://127.0.0.1:8000/generate', sys.argv[1].encode(), "
    "{'Content-Type': 'application/json'}); print(r.urlopen(q, timeout=120).read().decode())"
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    kept = os.environ.get("SORTSERVE_TEST_IMAGES")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("images")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    if not kept:
        shutil.rmtree(folder)


def build(dockerfile: Dockerfile, scratch: Path) -> Image:
    debian = debian_root(scratch / "debian")
    names = {stage.name for stage in dockerfile.stages}
    bases = {stage.base: debian for stage in dockerfile.stages if stage.base not in names}
    return ImageBuilder(ROOT, scratch, bases).build(dockerfile, "runtime")


def has_local_torch() -> bool:
    folders = os.environ.get("PIP_FIND_LINKS", "").split()
    return any(any(Path(folder).glob("torch-*+cpu-*.whl")) for folder in folders)


@pytest.fixture(scope="module")
def cpu_image(scratch: Path) -> Image:
    arguments = {"TORCH_BACKEND": ""} if has_local_torch() else {}
    return build(read_dockerfile(ROOT / "docker" / "Dockerfile.cpu", arguments), scratch)


@pytest.fixture(scope="module")
def container(cpu_image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    folder = tmp_path_factory.mktemp("container")
    flags = ["--kv-cache-memory", "256MiB", "--num-threads", "1"]
    with running(cpu_image, flags, folder / "data", folder / "log") as container:
        wait_until_healthy(container)
        yield container


def wait_until_healthy(container: Container) -> None:
    """As Docker does it: the image's own command, again and again."""
    for _ in range(300):
        if container.process.poll() is not None:
            break
        if container.run(container.image.config.health_command).returncode == 0:
            return
        time.sleep(2)
    raise AssertionError(container.log.read_text()[-4000:])


def files(image: Image) -> Iterator[Path]:
    for folder, _, names in os.walk(image.root):
        yield from (Path(folder, name) for name in names)


def assert_holds_no_compiler(image: Image) -> None:
    found = [path for path in files(image) if path.name in COMPILERS and os.access(path, os.X_OK)]
    assert found == []


def test_the_cpu_image_holds_no_compiler_no_pip_and_kernels_for_every_processor(
    cpu_image: Image,
) -> None:
    assert_holds_no_compiler(cpu_image)
    names = [path.name for path in files(cpu_image)]
    assert not {"pip", "pip3", "uv"} & set(names)
    for isa in ISAS.values():
        if isa.can_be_compiled():
            assert any(name.startswith(f"kernels-{isa.name}-") for name in names), isa.name


def test_the_cpu_image_has_torch_for_cpus(cpu_image: Image) -> None:
    metadata = list((cpu_image.root / "opt/venv").glob("lib/python3*/site-packages/*.dist-info"))
    names = [path.name.lower() for path in metadata]

    assert [name for name in names if name.startswith("torch-") and "+cpu" in name]
    assert [name for name in names if name.startswith(("nvidia", "cuda", "triton"))] == []


def test_nothing_of_this_machine_is_left_in_the_image(cpu_image: Image) -> None:
    assert not (cpu_image.root / "run" / "host").exists()
    assert not (cpu_image.root / "root" / ".cache").exists()
    assert list((cpu_image.root / "var/lib/apt/lists").iterdir()) == []


def test_the_server_answers_without_a_network_with_the_baked_model(container: Container) -> None:
    done = container.run(["python", "-c", ASK, json.dumps(SHALLOW)])

    assert done.returncode == 0, done.stderr + container.log.read_text()[-4000:]
    reply = json.loads(done.stdout)
    assert reply["model"] == "sorted-smollm2-135m"
    assert reply["budget"]["exit_layer"] == 24
    assert reply["choices"][0]["text"].strip()


def test_it_computes_with_kernels_that_nobody_compiled_here(container: Container) -> None:
    log = container.log.read_text()

    assert "compil" not in log.lower()
    maps = Path(f"/proc/{container.pid}/maps").read_text()
    assert "/backends/cpu/prebuilt/kernels-" in maps


def test_it_is_nobody_and_can_write_nothing_but_its_volume_and_tmp(container: Container) -> None:
    status = Path(f"/proc/{container.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)

    assert fields["Uid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    for folder, may in (("/data", True), ("/tmp", True), ("/opt/app", False), ("/etc", False)):
        for user in ("10001:10001", "0:0"):  # for root the read-only mount alone stands there
            done = container.run(["touch", f"{folder}/new"], user=user)
            assert (done.returncode == 0) is may, (folder, user, done.stderr)


def test_a_stop_drains_and_ends_with_zero(container: Container) -> None:
    """The last of this file's tests of the container."""
    assert container.stop(timeout_s=60) == 0


def test_an_image_with_the_extra_ray_starts_ray_from_a_login_shell(scratch: Path) -> None:
    """As KubeRay before 1.4 does."""
    arguments = {"EXTRAS": "ray", "MODEL": "mounted"}
    arguments |= {"TORCH_BACKEND": ""} if has_local_torch() else {}
    image = build(read_dockerfile(ROOT / "docker" / "Dockerfile.cpu", arguments), scratch)

    def said(command: str) -> str:
        shell = ["/bin/bash", "-lc", "--", command]
        inner = chroot_command(image.root, image.config, image.config.env, shell)
        done = subprocess.run(["sh", "-c", inner], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert_holds_no_compiler(image)
    assert said("ray --version").startswith("ray, version 2.")
    assert (
        said("python -c 'import sortserve.ray as own; print(callable(own.build_app))'") == "True\n"
    )


def test_the_steps_of_the_cuda_image_run_but_for_torch_and_its_base(scratch: Path) -> None:
    arguments = {"MODEL": "mounted", "TORCH_BACKEND": "" if has_local_torch() else "cpu"}
    image = build(read_dockerfile(ROOT / "docker" / "Dockerfile.cuda", arguments), scratch)

    assert_holds_no_compiler(image)
    names = [path.name for path in files(image)]
    assert any(name.startswith("triton-") and name.endswith(".so") for name in names)
    assert any(name.startswith("kernels-avx2-") for name in names)
    assert list((image.root / "opt" / "model").iterdir()) == []
    assert (image.root / "opt/app/bin/sortserve").exists()
