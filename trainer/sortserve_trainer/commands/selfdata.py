"""``sortserve selfdata``: the flags, and how far it is; the work is ``run/selfdata.py``'s."""

from __future__ import annotations

from collections.abc import Sequence

from sortserve.process.arguments import Parser
from sortserve.process.flags import add_flags
from sortserve_trainer.run.selfdata_settings import (
    GROUPS,
    POSITIONAL,
    SelfdataSettings,
    load_selfdata_settings,
)

__all__ = ["selfdata_command", "selfdata_parser"]


def selfdata_parser() -> Parser:
    """The command line of ``sortserve selfdata``."""
    parser = Parser(
        prog="sortserve selfdata",
        description="Let a model answer prompts, as training data for its own exits.",
    )
    add_flags(parser, SelfdataSettings, GROUPS, POSITIONAL)
    return parser


def selfdata_command(argv: Sequence[str]) -> int:
    """Run ``sortserve selfdata``; returns the exit code.

    Raises:
        SortserveError: a mistake of the user's, in one line.
        ModuleNotFoundError: an extra is missing.
    """
    settings = load_selfdata_settings(vars(selfdata_parser().parse_args(argv)))

    from sortserve_trainer.commands.console import Console
    from sortserve_trainer.run.selfdata import write_selfdata

    console = Console(soft_wrap=True, highlight=False)
    write_selfdata(settings, on_wave=lambda done, total: console.print(f"{done} of {total}"))
    return 0
