"""``sortserve eval``: flags in, report out as table, JSON, plot and ``sorted.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sortserve.arguments import Parser
from sortserve.errors import ConfigError
from sortserve.flags import add_flags
from sortserve_trainer.evaluation.settings import GROUPS, EvalSettings, load_eval_settings

if TYPE_CHECKING:
    from sortserve_trainer.evaluation.report import Report

__all__ = ["eval_command"]


def eval_command(argv: Sequence[str]) -> int:
    """Run ``sortserve eval``; returns the exit code.

    Raises:
        SortserveError: a mistake of the user's, in one line.
        ModuleNotFoundError: an extra is missing.
    """
    flags = vars(_parser().parse_args(argv))
    print_json = flags.pop("json")
    settings = load_eval_settings(flags)
    if settings.output is not None:
        _prepare_output(settings.output)

    from rich.console import Console

    from sortserve_trainer.evaluation.evaluate import evaluate, write_quality
    from sortserve_trainer.evaluation.table import quality_tables

    report = evaluate(settings)
    console = Console(soft_wrap=True, highlight=False)
    console.print(*quality_tables(report))
    if settings.write:
        console.print(write_quality(report, settings.model))
    if settings.output is not None:
        _write_files(report, settings.output)
        console.print(f"{settings.output} has report.json, quality.svg and quality.png.")
    if print_json:
        print(json.dumps(report.document(), ensure_ascii=False))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="sortserve eval", description="Measure each exit of a model on held-out files."
    )
    add_flags(parser, EvalSettings, GROUPS)
    parser.add_argument(
        "--no-base", action="store_const", const="none", dest="base", help="the same as --base none"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as one line of JSON, last"
    )
    parser.set_defaults(base="auto")
    return parser


def _prepare_output(folder: Path) -> None:
    """Find out before hours of work that its result could not be kept."""
    import matplotlib  # noqa: F401

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _write_files(report: Report, folder: Path) -> None:
    from sortserve_trainer.evaluation.plot import draw_quality

    plots = draw_quality(report)
    document = json.dumps(report.document(), indent=2, ensure_ascii=False) + "\n"
    files = {
        "report.json": document.encode(),
        "quality.svg": plots["svg"],
        "quality.png": plots["png"],
    }
    try:
        for name, content in files.items():
            draft = folder / f".{name}.tmp"
            draft.write_bytes(content)
            os.replace(draft, folder / name)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"--output {folder} cannot be written: {reason}.", param="output")
