"""``sortserve completion``: what lets a shell complete the commands and flags (shtab writes it)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sortserve.process.arguments import Parser

__all__ = ["completion_command", "completion_parser", "whole_parser"]

SHELLS = ("bash", "zsh", "fish", "tcsh")
FILES = ("FILE", "CONFIG", "CERTFILE", "KEYFILE", "UDS", "MODEL", "CHECKPOINT", "DATA")
"""What flags and arguments that take a path call their value."""
FOLDERS = ("DIR", "OUTPUT")


def completion_parser() -> Parser:
    """The command line of ``sortserve completion``."""
    parser = Parser(
        prog="sortserve completion",
        description="Print a script that completes commands, flags and their choices. For bash: "
        'eval "$(sortserve completion bash)" in ~/.bashrc. For zsh: write it to a file _sortserve '
        "in a folder of $fpath. For fish: sortserve completion fish | source, in config.fish.",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")
    return parser


def completion_command(arguments: Sequence[str]) -> int:
    """Print the script; returns the exit code.

    Raises:
        ModuleNotFoundError: shtab is not installed.
    """
    shell = completion_parser().parse_args(arguments).shell
    import shtab

    print(shtab.complete(whole_parser(shtab.FILE, shtab.DIRECTORY), shell=shell))
    return 0


def whole_parser(file: Any = None, folder: Any = None) -> argparse.ArgumentParser:
    """All commands as one parser; commands whose extra is missing have their names alone.

    Args:
        file: how shtab completes a path.
        folder: how it completes a folder.
    """
    from sortserve.cli import COMMANDS

    whole = argparse.ArgumentParser(prog="sortserve", description="The sortserve command.")
    whole.add_argument("--version", action="store_true", help="print the version")
    subparsers = whole.add_subparsers()
    for command in COMMANDS.values():
        try:
            parser = command.parser()
        except ModuleNotFoundError:
            subparsers.add_parser(command.name, help=command.help)
            continue
        for action in parser._actions:
            _complete_value(action, file, folder)
        subparsers.add_parser(
            command.name, help=command.help, parents=[parser], add_help=False, allow_abbrev=False
        )
    return whole


def _complete_value(action: argparse.Action, file: Any, folder: Any) -> None:
    """Say what values a flag takes: shtab reads it off these attributes."""
    name = str(action.metavar or "")
    if name.startswith("{"):  # settings check their own values, so argparse knows no choices
        action.choices = name.strip("{}").split(",")
    elif name in FOLDERS:
        action.complete = folder  # type: ignore[attr-defined]
    elif name in FILES or action.type is Path:
        action.complete = file  # type: ignore[attr-defined]
