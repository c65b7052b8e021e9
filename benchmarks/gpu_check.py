"""Everything that only a CUDA device can show, in one command of at most eight minutes.

Runs all tests marked ``gpu``, then ``benchmarks.offline`` (decode, prefill and exits, beside the
card's measured bandwidth and matrix rate) on a random model of Llama 3.2 1B's shape, with the
backend that ``auto`` takes and with the reference, and on ``--smollm2`` if that is given. Each part
is a process of its own with a time limit; one that fails costs itself alone. One JSON document is
written after each part, and is the last line.

Needs Python 3.12, torch with CUDA, transformers, tokenizers, safetensors, pytest and hypothesis,
and nothing from a network. ``--device cpu`` is a rehearsal: the same parts with a tiny model.

    make gpu-check RESULT=benchmarks/results/2026-11-26-gpu-check.json
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.gpu_run import add_run_arguments, run_benchmark
from benchmarks.lib.parts import Part
from benchmarks.lib.shapes import exits_of

__all__ = ["find_gpu_tests", "main"]

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 470.0
TESTS_S, MODEL_S, OFFLINE_S = 240.0, 60.0, 110.0
MARK = re.compile(r"\bpytest\.mark\.gpu\b")
TEST_SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|error)")


def find_gpu_tests(root: Path = ROOT) -> list[str]:
    """The files that have tests marked ``gpu``: others may need what this machine has not."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [str(f.relative_to(root)) for f in files if MARK.search(f.read_text(encoding="utf-8"))]


def read_summary(output: str) -> dict[str, int]:
    """Counts of tests by what became of them.

    Raises:
        ValueError: pytest printed none.
    """
    counts = {what: int(n) for n, what in TEST_SUMMARY.findall(output.strip().rpartition("\n")[2])}
    if not counts:
        raise ValueError("no summary of tests")
    return counts


def parts_of(arguments: argparse.Namespace, folder: Path) -> list[Part]:
    """All there is to do; models are made in ``folder``."""
    python = (sys.executable, "-W", "ignore", "-m")
    is_rehearsal = arguments.device == "cpu"
    shape = "tiny" if is_rehearsal else "1b"
    random_model = str(folder / shape)
    tests = [
        *python,
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=",
    ]
    tests += ["-o", "addopts=--import-mode=importlib", *find_gpu_tests()]

    def offline(model: str, exits: str, *more: str) -> list[str]:
        dtype = "float32" if is_rehearsal else "bfloat16"
        command = [*python, "benchmarks.offline", "--device", arguments.device, "--dtype", dtype]
        command += ["--model", model, "--exits", exits, "--rounds", "1" if is_rehearsal else "2"]
        command += ["--context", "8", "--prefill-tokens", "16"] if is_rehearsal else []
        return [*command, "--steps", str(arguments.steps), *more]

    rows = ("--rows", *map(str, arguments.rows))
    make = [*python, "benchmarks.lib.shapes", shape, random_model, "--device", arguments.device]
    parts = [
        Part("model", make, MODEL_S),
        Part("tests", tests, TESTS_S, read=read_summary),
        Part(
            f"offline {shape}",
            offline(random_model, exits_of(shape), *rows),
            OFFLINE_S,
            needs="model",
        ),
    ]
    if arguments.smollm2 is not None:
        command = offline(arguments.smollm2, exits_of("smollm2-135m"), *rows)
        parts.append(Part("offline smollm2", command, OFFLINE_S))
    few = ("--rows", *map(str, arguments.rows[:3:2]), "--backend", "reference")
    command = offline(random_model, exits_of(shape), *few)
    parts.append(Part(f"offline {shape}, reference", command, OFFLINE_S, needs="model"))
    return parts


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser, TOTAL_S)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=15)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, measures, writes; 2 without a CUDA device, 1 if a part did not go well."""
    return run_benchmark("gpu_check", parse_arguments(argv), parts_of)


if __name__ == "__main__":
    sys.exit(main())
