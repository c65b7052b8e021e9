"""The trainer's speed on one GPU, in one command of at most eight minutes.

Tokens a second of optimiser steps (``benchmarks.train``) beside the floor of their matrix products,
by the methods ``soft`` and ``soft+kd``, on SmolLM2-135M (``--smollm2``, else random weights in its
shape) and on a random model of Llama 3.2 1B's shape. Each part is a process of its own with a time
limit; one that fails costs itself alone. One JSON document is written after each part, and is the
last line.

Needs torch with CUDA, transformers, tokenizers and safetensors, for ``soft+kd`` peft, and nothing
from a network. ``--device cpu`` is a rehearsal: the same parts with tiny models.

    make gpu-train RESULT=benchmarks/results/2026-11-26-gpu-train.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.gpu_run import add_run_arguments, run_benchmark
from benchmarks.lib.parts import Part
from benchmarks.lib.shapes import exits_of

__all__ = ["main"]

TOTAL_S = 470.0
MODEL_S, TRAIN_S = 60.0, 110.0
METHODS = ("soft", "soft+kd")


def parts_of(arguments: argparse.Namespace, folder: Path) -> list[Part]:
    """All there is to do; models are made in ``folder``."""
    python = (sys.executable, "-W", "ignore", "-m")
    is_rehearsal = arguments.device == "cpu"
    parts: list[Part] = []
    for name in ("smollm2-135m", "1b"):
        shape = "tiny" if is_rehearsal else name
        model = str(folder / name)
        is_given = name == "smollm2-135m" and arguments.smollm2 is not None
        if is_given:
            model = arguments.smollm2
        else:
            make = [*python, "benchmarks.lib.shapes", shape, model, "--device", arguments.device]
            parts.append(Part(f"model {name}", make, MODEL_S))
        train = [*python, "benchmarks.train", "--device", arguments.device, "--model", model]
        train += ["--exits", exits_of(shape), "--tokens", str(64 if is_rehearsal else 8192)]
        needs = None if is_given else f"model {name}"
        train += ["--in-process", "--rounds", "1", "--steps", str(arguments.steps)]
        train += ["--gemm-size", "128"] if is_rehearsal else []
        for method in METHODS:
            command = [*train, "--methods", method]
            parts.append(Part(f"{method} on {name}", command, TRAIN_S, needs=needs))
    return parts


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser, TOTAL_S)
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 2 without a CUDA device, 1 if a part did not go well."""
    return run_benchmark("gpu_train", parse_arguments(argv), parts_of)


if __name__ == "__main__":
    sys.exit(main())
