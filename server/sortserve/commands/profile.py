"""``sortserve profile``: its command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sortserve.process.arguments import Parser

__all__ = ["profile_command", "profile_parser"]


def profile_parser() -> Parser:
    """The flags of ``serve``, and the plot."""
    from sortserve.process.flags import add_flags

    parser = Parser(
        prog="sortserve profile",
        description="Time the steps of a model on this machine, keep the times for the next start "
        "of a server, and print the cost model. Takes the flags of `serve`.",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as an SVG")
    add_flags(parser)
    return parser


def profile_command(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit code.

    Raises:
        ConfigError: a flag is wrong, or the plot cannot be written.
        CheckpointError: the model cannot be served.
    """
    from sortserve.process.config import load_settings

    flags = vars(profile_parser().parse_args(arguments))
    plot = flags.pop("plot")
    settings = load_settings(flags)
    from sortserve.process.profiling import profile

    return profile(settings, plot)
