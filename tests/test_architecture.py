"""What the build must keep: who may import whom, and what a clean checkout looks like."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sortserve import __version__

ROOT = Path(__file__).parents[1]
TORCH_FREE = (
    "sortserve",
    "sortserve.core.budget",
    "sortserve.cli",
    "sortserve.process.config",
    "sortserve.core.errors",
    "sortserve.telemetry.logs",
    "sortserve.telemetry.metrics",
    "sortserve.core.request",
    "sortserve.core.sampling_params",
    "sortserve.scheduling",
    "sortserve.scheduling.policies.table",
    "sortserve.scheduling.scheduler",
    "sortserve.core.sequence",
    "sortserve.simulation",
)


def modules_loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after running some code."""
    report = "import sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(run.stdout.rpartition("LOADED ")[2].split())


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@pytest.mark.parametrize("folder", ["server", "client", "trainer"])
def test_the_folders_of_the_packages_are_no_packages(folder: str) -> None:
    """With an ``__init__.py`` here every module could be imported under two names."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_torch_free_modules_load_no_torch() -> None:
    imports = "".join(f"import {module}\n" for module in TORCH_FREE)

    assert not modules_loaded_by(imports) & {"torch", "transformers", "fastapi"}


def test_the_client_loads_neither_torch_nor_the_server() -> None:
    loaded = modules_loaded_by("import sortserve_client")

    assert not loaded & {"torch", "transformers", "sortserve", "sortserve_trainer"}


def test_help_loads_no_torch() -> None:
    code = """
from sortserve.cli import main
for command in ("", "serve ", "chat ", "generate ", "exits ", "bench ", "eval ", "completion "):
    try:
        main(f"{command}--help".split())
    except SystemExit:
        pass
"""
    assert "torch" not in modules_loaded_by(code)


def test_the_version_has_an_entry_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()

    assert re.search(rf"^## {re.escape(__version__)}\b", changelog, re.MULTILINE)


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    # The container image's own user is nobody's machine.
    personal = re.compile(rb"/(?:home/(?!sortserve\b)|Users/|root/|work/)\w[\w./-]*")
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        if path != Path(__file__)
        for match in personal.finditer(path.read_bytes())
    ]

    assert found == []


def test_every_package_says_that_it_is_typed() -> None:
    for package in ("server/sortserve", "client/sortserve_client", "trainer/sortserve_trainer"):
        assert (ROOT / package / "py.typed").is_file()
