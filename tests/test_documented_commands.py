"""What the pages tell people to type can be typed: commands, flags, programs, make targets."""

from __future__ import annotations

import importlib.util
import re

import pytest

from sortserve.cli import COMMANDS
from sortserve.core.errors import ConfigError
from support.pages import PAGES, ROOT, inline_commands, typed_commands


def test_the_pages_have_commands() -> None:
    """Else the tests below would find nothing to hold."""
    assert sum(len(typed_commands(page, "sortserve")) for page in PAGES) >= 25
    assert sum(len(inline_commands(page)) for page in PAGES) >= 25
    assert len(typed_commands("docs/cli.md", "sortserve")) >= 13


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_of_a_page_is_accepted(page: str) -> None:
    for _, name, *arguments in typed_commands(page, "sortserve"):
        try:
            COMMANDS[name].parser().parse_args(arguments)
        except ConfigError as error:
            raise AssertionError(f"sortserve {name} {arguments}: {error.message}") from error


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_sentence_gives_a_command_exists(page: str) -> None:
    for name, *words in inline_commands(page):
        flags = COMMANDS[name].parser()._option_string_actions
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert [flag for flag in given if flag not in flags] == [], f"sortserve {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_program_and_target_of_a_page_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = re.findall(r"^([a-z][a-z -]*):(?!=)", makefile, re.MULTILINE)
    made = {target for rule in rules for target in rule.split()}
    for _, *words in typed_commands(page, "make"):
        targets = [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)]
        assert set(targets) <= made, words
    for _, *words in typed_commands(page, "python", "python3"):
        if words[:1] == ["-m"] and words[1].partition(".")[0] in ("benchmarks", "sortserve"):
            assert importlib.util.find_spec(words[1]) is not None, words


def test_every_command_has_its_place_on_the_page_of_commands() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")

    assert [name for name in COMMANDS if f"`{name}`" not in page] == []


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_the_help_of_a_command_explains_every_flag(command: object) -> None:
    from sortserve.cli import Command

    assert isinstance(command, Command)
    actions = command.parser()._actions

    assert command.parser().prog == f"sortserve {command.name}"
    assert [action.dest for action in actions if not action.help] == []
