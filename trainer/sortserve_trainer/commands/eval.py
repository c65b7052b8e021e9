"""``sortserve eval``: flags in, report out as table, JSON, plot and ``sorted.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sortserve.process.arguments import Parser
from sortserve.process.flags import add_flags
from sortserve_trainer.evaluation.settings import GROUPS, EvalSettings, load_eval_settings

__all__ = ["eval_command", "eval_parser"]


def eval_command(argv: Sequence[str]) -> int:
    """Run ``sortserve eval``; returns the exit code.

    Raises:
        SortserveError: a mistake of the user's, in one line.
        ModuleNotFoundError: an extra is missing.
    """
    flags = vars(eval_parser().parse_args(argv))
    print_json = flags.pop("json")
    settings = load_eval_settings(flags)

    from sortserve_trainer.evaluation.writing import prepare_folder, write_files, write_quality

    if settings.output is not None:
        prepare_folder(settings.output)

    # After the folder: these load torch and transformers, for which a mistake need not wait.
    from sortserve_trainer.commands.console import Console
    from sortserve_trainer.evaluation.evaluate import evaluate
    from sortserve_trainer.evaluation.table import quality_tables

    report = evaluate(settings)
    # Files first: they are kept, whoever has stopped reading the output.
    said = []
    if settings.write and settings.quantize != "none":
        said.append(f"Measured with --quantize {settings.quantize}: not written into sorted.json.")
    elif settings.write:
        said.append(write_quality(report, settings.model))
    if settings.output is not None:
        write_files(report, settings.output)
        said.append(f"{settings.output} has report.json, quality.svg and quality.png.")
    console = Console(soft_wrap=True, highlight=False)
    console.print(*quality_tables(report))
    unusable = [str(layer) for layer, usable in report.usable().items() if not usable]
    if unusable:
        console.print(f"Not usable: {', '.join(unusable)} (see docs/evaluation.md).")
    for line in said:
        console.print(line)
    if print_json:
        print(json.dumps(report.document(), ensure_ascii=False))
    return 0


def eval_parser() -> Parser:
    """The command line of ``sortserve eval``."""
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
