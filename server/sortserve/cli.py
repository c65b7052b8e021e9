"""The ``sortserve`` command. Imports what a subcommand needs only when it runs.

Exit codes: 0 done, 1 the server failed or could not be reached, or the output could not be written,
2 a mistake on the command line, in the configuration or in the checkpoint, 130 interrupted, 141
nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import getpass
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sortserve import __version__
from sortserve.core.errors import ConfigError
from sortserve.process.arguments import Parser
from sortserve.process.console import run_command

__all__ = ["COMMANDS", "Command", "main"]


@dataclass(frozen=True)
class Command:
    """A subcommand. Its module has ``NAME_parser()`` and ``NAME_command(arguments)``.

    The module is found by name when it is needed: some load torch, and the trainer builds on this
    package, which therefore must not import it.
    """

    name: str
    help: str
    """Its line in the help."""
    extra: str | None
    """The extra that it needs; None: the base install will do."""
    module: str

    def parser(self) -> argparse.ArgumentParser:
        """Its command line.

        Raises:
            ModuleNotFoundError: its extra is not installed.
        """
        parser: argparse.ArgumentParser = self._find("parser")()
        return parser

    def run(self, arguments: Sequence[str]) -> int:
        """Run it; returns the exit code."""
        code: int = self._find("command")(arguments)
        return code

    def _find(self, kind: str) -> Any:
        return getattr(importlib.import_module(self.module), f"{self.name}_{kind}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _name_user()
    return run_command(lambda: _dispatch(arguments))


def _name_user() -> None:
    """Name a user without a passwd entry, as in a container with a random uid.

    Libraries that name a folder after the user (torch among them) raise where there is no name.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


def _dispatch(arguments: list[str]) -> int:
    if any("\0" in argument for argument in arguments):
        raise ConfigError("an argument holds a NUL character.")
    if arguments[:1] == ["--version"]:
        return version_command([])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    command = COMMANDS.get(name)
    if command is None:
        raise ConfigError(f"{name!r} is not a command: choose one of {', '.join(COMMANDS)}.")
    try:
        return command.run(rest)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing.startswith("sortserve"):
            raise
        raise ConfigError(
            f"`sortserve {name}` needs {missing}, which is not installed: "
            f"pip install 'sortserve[{command.extra or 'server'}]'"
        ) from error


def _help() -> str:
    lines = ["usage: sortserve COMMAND ...", "", "commands:"]
    lines += [f"  {name:<12} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "`sortserve COMMAND --help` shows the flags of a command."])


def version_parser() -> Parser:
    """The command line of ``sortserve version``."""
    return Parser(prog="sortserve version", description="Print the version.")


def version_command(arguments: Sequence[str]) -> int:
    """Print the version; returns the exit code."""
    version_parser().parse_args(arguments)
    print(__version__)
    return 0


_TABLE = (
    Command("serve", "start a server", "server", "sortserve.commands.serve"),
    Command("chat", "talk to a model in the terminal", None, "sortserve.commands.chat"),
    Command(
        "generate",
        "ask a running server, and stream its answer",
        None,
        "sortserve.commands.generate",
    ),
    Command(
        "exits", "show what each exit costs and how good it is", None, "sortserve.commands.exits"
    ),
    Command("bench", "load a running server, and time it", None, "sortserve.commands.bench"),
    Command("keys", "make API keys with limits of their own", "server", "sortserve.commands.keys"),
    Command("train", "make a sorted model", "train", "sortserve_trainer.run.train"),
    Command("eval", "measure each exit of a model", "train", "sortserve_trainer.commands.eval"),
    Command(
        "export",
        "write one exit as a plain Hugging Face folder",
        "train",
        "sortserve_trainer.commands.export",
    ),
    Command(
        "selfdata",
        "let a model write training data for its own exits",
        "train",
        "sortserve_trainer.commands.selfdata",
    ),
    Command(
        "profile",
        "time a model's steps, and print their cost",
        "server",
        "sortserve.commands.profile",
    ),
    Command(
        "kernels", "compile the CPU kernels ahead of time", "server", "sortserve.process.kernels"
    ),
    Command(
        "completion",
        "print a script that lets your shell complete commands and flags",
        "completion",
        "sortserve.commands.completion",
    ),
    Command("version", "print the version", None, __name__),
)
COMMANDS = {command.name: command for command in _TABLE}
"""By name, in the order of the help."""
