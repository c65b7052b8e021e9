r"""SoFT, its baselines and ours on the same data and the same number of tokens: one table per exit.

Trains each method by ``sortserve train`` and measures each result by ``sortserve eval``, all with
the same data, tokens, exits and seed, and each with its own best-known rate unless told. Runs go
on where they were cut; finished ones are not done again. Reports are kept in ``--work``. The last
line is one JSON document.

    python -m benchmarks.recipes --work build/recipes --max-tokens 200000 \
        --data train.jsonl --eval-data dev.jsonl --qa questions.jsonl --prompts prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.common import environment, print_json, print_table

__all__ = ["main"]

METHODS = ("sft", "sft+ict", "soft", "soft+kd")
METRICS = ("loss", "agreement", "exact_match", "f1", "repetition", "loop_rate")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures and prints."""
    arguments, more = _parser().parse_known_args(argv)
    described = environment()
    reports = {method: _report(method, arguments, more) for method in arguments.methods}
    results = {method: _by_exit(report) for method, report in reports.items()}
    exits = sorted({exit_layer for found in results.values() for exit_layer in found})
    for metric in METRICS:
        rows = [
            (method, *(_cell(found.get(e, {}).get(metric)) for e in exits))
            for method, found in results.items()
        ]
        if any(cell != "-" for row in rows for cell in row[1:]):
            print_table([metric, *(f"exit {e}" for e in exits)], rows)
            print()
    print_json("recipes", arguments, described, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        epilog="Any other flag goes to every `sortserve train`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and reports")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--exits", default="18,24,27")
    parser.add_argument("--max-tokens", type=int, default=200_000)
    parser.add_argument("--data", action="append", required=True, help="to train on")
    parser.add_argument("--eval-data", action="append", required=True, help="held-out files")
    parser.add_argument("--qa", help="question file")
    parser.add_argument("--prompts", help="prompt file")
    parser.add_argument("--limit-rows", type=int, default=100, help="of each evaluation file")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--learning-rate", action="append", default=[], metavar="METHOD=RATE")
    return parser


def _report(method: str, arguments: argparse.Namespace, more: Sequence[str]) -> dict[str, Any]:
    name = method.replace("+", "-")
    checkpoint, folder = arguments.work / name, arguments.work / f"{name}-report"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not checkpoint.is_dir():
        _sortserve(*_train_flags(method, checkpoint, arguments), *more)
    if not (folder / "report.json").is_file():
        _sortserve(*_eval_flags(method, checkpoint, folder, arguments))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def _train_flags(method: str, output: Path, arguments: argparse.Namespace) -> list[str]:
    flags = ["train", "--method", method, "--exits", arguments.exits, "--output", str(output)]
    flags += ["--max-tokens", str(arguments.max_tokens), "--report-to", "none"]
    for path in arguments.data:
        flags += ["--data", path]
    rates = dict(item.split("=", 1) for item in arguments.learning_rate)
    if method in rates:
        flags += ["--learning-rate", rates[method]]
    return flags


def _eval_flags(
    method: str, checkpoint: Path, output: Path, arguments: argparse.Namespace
) -> list[str]:
    flags = ["eval", str(checkpoint), "--output", str(output), "--no-base", "--no-write"]
    flags += ["--limit-rows", str(arguments.limit_rows)]
    flags += ["--max-tokens", str(arguments.answer_tokens)]
    if method == "sft":
        flags += ["--exits", arguments.exits]  # untrained exits, read through the shared head
    for path in arguments.eval_data:
        flags += ["--data", path]
    for flag, path in (("--qa", arguments.qa), ("--prompts", arguments.prompts)):
        flags += [flag, path] if path is not None else []
    return flags


def _sortserve(*arguments: str) -> None:
    print("sortserve", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "sortserve", *arguments], check=True, stdout=sys.stderr)


def _by_exit(report: dict[str, Any]) -> dict[int, dict[str, float]]:
    return {exit_["exit_layer"]: exit_["metrics"] for exit_ in report["exits"]}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
