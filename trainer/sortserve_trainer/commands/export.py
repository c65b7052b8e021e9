"""``sortserve export``: the flags; the work is ``run/export.py``'s."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from sortserve.process.arguments import Parser, integer

__all__ = ["export_command", "export_parser"]


def export_command(argv: Sequence[str]) -> int:
    """Run ``sortserve export``; returns the exit code.

    Raises:
        SortserveError: a mistake of the user's, in one line.
    """
    options = export_parser().parse_args(argv)

    from sortserve_trainer.run.export import export_submodel

    output = export_submodel(
        options.model, options.exit, options.output, dtype=options.dtype, revision=options.revision
    )
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}{os.sep}: exit {options.exit} of {options.model}, {size / 1e6:.0f} MB")
    return 0


def export_parser() -> argparse.ArgumentParser:
    """The command line of ``sortserve export``."""
    parser = Parser(
        prog="sortserve export",
        description="Write one exit of a sorted checkpoint as a plain Hugging Face folder.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, package:PKG/FILE.gguf or a Hugging Face id"
    )
    parser.add_argument(
        "--exit",
        type=integer,
        required=True,
        metavar="LAYER",
        help="the exit; the last is full depth",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="must not exist, or be empty"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights on disk; default: float32, which rounds nothing",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    return parser
