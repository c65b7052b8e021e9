"""The pages that lead through the code: the files and functions that they name exist."""

from __future__ import annotations

import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("", "server/sortserve", "trainer/sortserve_trainer")
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/training.md",
    "docs/models.md",
    "benchmarks/README.md",
    "checkpoints/README.md",
)
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def named_functions() -> list[tuple[str, str]]:
    """(module, qualified name) of every function in the table "Where is ...?"."""
    table = ARCHITECTURE.partition("## Where is ...?")[2].partition("\n## ")[0]
    places = re.findall(r"`([\w/]+)\.py`: ((?:`[\w.]+`(?:, )?)+)", table)
    return [
        ("sortserve." + path.replace("/", "."), name)
        for path, names in places
        for name in re.findall(r"`([\w.]+)`", names)
    ]


def test_the_architecture_page_answers_four_questions() -> None:
    assert len(re.findall(r"^\| Where ", ARCHITECTURE, re.MULTILINE)) == 4
    assert len(named_functions()) >= 8


@pytest.mark.parametrize(("module", "name"), named_functions())
def test_the_functions_that_it_names_exist(module: str, name: str) -> None:
    assert callable(reduce(getattr, name.split("."), import_module(module)))


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_folders_that_a_page_names_exist(page: str) -> None:
    """Of code: paths with a slash, relative to the repository or to the package."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    named = re.findall(r"`((?:[a-z_0-9]+/)+(?:\w+\.py)?)`", text)

    missing = [path for path in named if not any((ROOT / base / path).exists() for base in CODE)]

    assert missing == []
