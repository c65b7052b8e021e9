"""The trainer's speed on one GPU, in at most eight minutes, and a checkpoint made on it.

Tokens a second of optimiser steps (``benchmarks.train``) beside the floor of their matrix products,
by the methods ``soft`` and ``soft+kd``, on SmolLM2-135M (``--smollm2``, else random weights in its
shape) and on a random model of Llama 3.2 1B's shape. Each part is a process of its own with a time
limit; one that fails costs itself alone. One JSON document is written after each part, and is the
last line.

With ``--minutes`` above 0 (20 unless told) and ``--data``, SmolLM2-135M is then trained by the
recipe of the checkpoint that we ship and stopped after so many minutes, with a checkpoint at
``--checkpoint``; the same command goes on from there. Data that ``sortserve train --prepare-only``
has tokenised into ``CHECKPOINT.run`` need not be on the machine (``--print-recipe`` prints the
command). ``--recipe`` adds flags or replaces them, and ``--only-recipe`` leaves the rest out.

Needs torch with CUDA, transformers, tokenizers and safetensors, for ``soft+kd`` peft, and nothing
from a network; the recipe needs what ``sortserve train`` does. ``--device cpu`` is a rehearsal: the
same parts with tiny models.

    make gpu-train RESULT=benchmarks/results/2026-11-26-gpu-train.json
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.gpu_run import add_run_arguments, run_benchmark
from benchmarks.lib.parts import Part
from benchmarks.lib.shapes import exits_of
from sortserve.checkpoint.sorted_json import SortedInfo

__all__ = ["main"]

TOTAL_S = 470.0
MODEL_S, TRAIN_S = 60.0, 110.0
METHODS = ("soft", "soft+kd")
SAVE_S = 240.0
"""Beside the minutes of the recipe: what comes after the last step, and a slow disk."""
RECIPE = {
    "--exits": "18,21,24,27",
    "--teacher": "base",
    "--weighting": "depth-squared",
    "--protect": "0.1",
    "--vocab-sample": "0",
    "--learning-rate": "1e-3",
    "--warmup": "0.05",
    "--pack-length": "2048",
    "--batch-size": "16",
    "--held-out": "0.005",
    "--eval-every": "250",
    "--save-every": "250",
    "--log-every": "10",
    "--save-dtype": "bfloat16",
    "--report-to": "none",
}
"""Flags of ``sortserve train``: 32,768 tokens a step, and the loss over the whole vocabulary."""
REHEARSAL = {"--exits": "2", "--pack-length": "512", "--batch-size": "1", "--max-tokens": "4000"}
RATE = re.compile(r"\| (\d+) tokens/s")


def recipe_command(arguments: argparse.Namespace, model: str) -> list[str]:
    """``sortserve train`` as the recipe has it."""
    is_rehearsal = arguments.device == "cpu"
    given = arguments.recipe.split()
    flags = {**RECIPE, **(REHEARSAL if is_rehearsal else {})}
    kept = [part for name, value in flags.items() if name not in given for part in (name, value)]
    data = [part for path in arguments.data for part in ("--data", path)]
    command = [sys.executable, "-W", "ignore", "-m", "sortserve", "train", "--base", model, *data]
    command += [*kept, "--train-on-prompts", "--output", str(arguments.checkpoint)]
    return [*command, "--device", arguments.device, *given]


def read_recipe(checkpoint: Path, output: str) -> dict[str, Any]:
    """What became of the run: from its checkpoint, and the rate from what it printed.

    Raises:
        ValueError: there is no checkpoint.
    """
    info = SortedInfo.read(checkpoint)
    if info is None:
        raise ValueError("no checkpoint")
    names = ("steps", "steps_planned", "stopped_by", "tokens", "held_out_loss", "versions")
    found = {name: info.recipe[name] for name in names if name in info.recipe}
    return {**found, "tokens_per_s": [int(rate) for rate in RATE.findall(output)]}


def parts_of(arguments: argparse.Namespace, folder: Path) -> list[Part]:
    """All there is to do; models are made in ``folder``."""
    python = (sys.executable, "-W", "ignore", "-m")
    is_rehearsal = arguments.device == "cpu"
    parts: list[Part] = []
    if not arguments.only_recipe:
        parts += _measurements(arguments, folder, python, is_rehearsal=is_rehearsal)
    if arguments.data and arguments.minutes > 0:
        parts.append(_recipe(arguments, folder, is_rehearsal=is_rehearsal))
    return parts


def _recipe(arguments: argparse.Namespace, folder: Path, *, is_rehearsal: bool) -> Part:
    model = arguments.smollm2 or str(folder / "smollm2-135m")
    seconds = 60.0 * arguments.minutes
    return Part(
        "recipe",
        [*recipe_command(arguments, model), "--max-time", str(max(1, round(seconds)))],
        seconds + SAVE_S,
        read=partial(read_recipe, arguments.checkpoint),
        needs=None if arguments.smollm2 else "model smollm2-135m",
    )


def _measurements(
    arguments: argparse.Namespace, folder: Path, python: Sequence[str], *, is_rehearsal: bool
) -> list[Part]:
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
        train += [
            "--exits",
            exits_of(shape),
            "--tokens",
            str(64 if is_rehearsal else 32_768 if name == "smollm2-135m" else 8192),
        ]
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
    parser.add_argument("--minutes", type=float, default=20.0, help="of the recipe")
    parser.add_argument("--data", action="append", default=[], help="as sortserve train takes it")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/gpu-train"))
    parser.add_argument("--recipe", default="", metavar="FLAGS", help="of sortserve train")
    parser.add_argument("--only-recipe", action="store_true")
    parser.add_argument("--print-recipe", action="store_true", help="the command, and end")
    arguments = parser.parse_args(argv)
    if arguments.only_recipe and not (arguments.data and arguments.smollm2):
        parser.error("--only-recipe needs --data and --smollm2")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 2 without a CUDA device, 1 if a part did not go well."""
    arguments = parse_arguments(argv)
    if arguments.print_recipe:
        print(shlex.join(recipe_command(arguments, arguments.smollm2 or "SMOLLM2")))
        return 0
    if arguments.data:
        arguments.total_s += 60.0 * arguments.minutes + SAVE_S
    return run_benchmark("gpu_train", arguments, parts_of)


if __name__ == "__main__":
    sys.exit(main())
