"""A benchmark for a GPU, in parts, with a rehearsal on a CPU: one JSON document in the end."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.common import environment
from benchmarks.lib.parts import Part, run_parts, write_document

__all__ = ["add_run_arguments", "run_benchmark"]


def add_run_arguments(parser: argparse.ArgumentParser, total_s: float) -> None:
    """What every such benchmark is told."""
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--total-s", type=float, default=total_s, help="for all parts")
    parser.add_argument("--smollm2", metavar="MODEL", help="a checkpoint of SmolLM2-135M")


def run_benchmark(
    benchmark: str,
    arguments: argparse.Namespace,
    parts_of: Callable[[argparse.Namespace, Path], Sequence[Part]],
) -> int:
    """Run the parts, and print the document; 2 without the device, 1 if a part did not go well.

    Args:
        benchmark: its name.
        arguments: those of ``add_run_arguments`` among them.
        parts_of: the parts, whose models lie in a folder that is gone in the end.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            f"{benchmark} needs a CUDA device and a build of torch that finds it; --device cpu is "
            "a rehearsal.",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        document = _run(benchmark, arguments, parts_of(arguments, Path(folder)))
    print(json.dumps(document))
    return int(any(part["status"] != "ok" for part in document["parts"].values()))


def _run(benchmark: str, arguments: argparse.Namespace, parts: Sequence[Part]) -> dict[str, Any]:
    """What was found, and on what; written after each part."""
    is_cuda = arguments.device == "cuda"
    described = {
        "benchmark": benchmark,
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "environment": environment(),
        "device": {
            "name": torch.cuda.get_device_name() if is_cuda else "cpu, a rehearsal",
            "torch": torch.__version__,
        },
    }

    def write(found: Mapping[str, Any]) -> None:
        write_document(arguments.output, {**described, "parts": found})

    found = run_parts(parts, total_s=arguments.total_s, after_each=write)
    return {**described, "parts": found}
