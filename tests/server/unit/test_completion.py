"""Shell completion: a real bash completes commands, flags and their choices."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from sortserve.cli import COMMANDS, main
from sortserve.commands.completion import whole_parser

needs_shtab = pytest.mark.skipif(
    importlib.util.find_spec("shtab") is None, reason="needs the extra `completion`"
)


def parsers_of(whole: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (
        action for action in whole._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(subparsers.choices)


def test_every_command_and_every_flag_of_it_is_known() -> None:
    known = parsers_of(whole_parser())

    assert list(known) == list(COMMANDS)
    for name, command in COMMANDS.items():
        assert known[name].format_usage().split()[1:3] == ["sortserve", name]
        own = command.parser()
        assert set(own._option_string_actions) <= set(known[name]._option_string_actions)


def test_settings_that_are_one_of_a_few_have_choices() -> None:
    serve = parsers_of(whole_parser())["serve"]

    assert serve._option_string_actions["--dtype"].choices == [
        "auto", "bfloat16", "float16", "float32",
    ]  # fmt: skip


def test_a_command_whose_extra_is_missing_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: object) -> argparse.ArgumentParser:
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr("sortserve.cli.Command.parser", missing)

    assert list(parsers_of(whole_parser())) == list(COMMANDS)


def test_a_shell_that_is_not_known_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "cmd"]) == 2

    assert "choose from" in capsys.readouterr().err


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shtab = pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "sortserve.bash"
    path.write_text(shtab.complete(whole_parser(shtab.FILE, shtab.DIRECTORY), shell="bash"))
    return path


@needs_shtab
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sortserve ch", ["chat"]),
        ("sortserve generate --bud", ["--budget-ms"]),
        ("sortserve serve --dtype b", ["bfloat16"]),
        ("sortserve chat --on-miss re", ["reject"]),
        ("sortserve completion z", ["zsh"]),
    ],
)
def test_bash_completes(script: Path, typed: str, offered: list[str]) -> None:
    words = typed.split(" ")
    program = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_sortserve
printf '%s\\n' "${COMPREPLY[@]}"
"""
    run = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", str(script), *words],
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.stderr == ""
    assert [line.strip() for line in run.stdout.split()] == offered


@needs_shtab
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_every_shell_gets_a_script_that_names_the_commands(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0

    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
