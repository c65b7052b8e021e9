"""Everything that only a CUDA device can show, in one command: the ``gpu`` tests, then speed.

Runs the tests marked ``gpu``, then ``benchmarks.offline`` on a random model of Llama 3.2 1B's shape
(or on ``--model``), and writes one JSON document, which is also the last line. Needs torch with
CUDA, transformers, tokenizers, safetensors, pytest and hypothesis, and nothing from a network.

    make gpu-check RESULT=benchmarks/results/2026-11-26-gpu-check.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.common import environment
from support.tiny_models import tiny_tokenizer

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
SHAPE_OF_1B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
"""Llama 3.2 1B's."""
TEST_SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|error)")


def make_random_llama(folder: Path, shape: dict[str, Any] = SHAPE_OF_1B) -> None:
    """A checkpoint of random weights in bf16, with the tokenizer of the tests."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def run_tests() -> dict[str, Any]:
    """The ``gpu`` tests in a process of their own: counts, and the end of what they printed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/gpu",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings="],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-8000:], done.stderr[-2000:])
    counts = {what: int(n) for n, what in TEST_SUMMARY.findall(done.stdout.splitlines()[-1])}
    return {"returncode": done.returncode, **counts}


def run_offline(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """``benchmarks.offline`` in a process of its own: its JSON."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.offline",
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
    ]
    command += ["--model", model, "--exits", arguments.exits, "--steps", str(arguments.steps)]
    command += ["--rounds", "2", "--rows", *map(str, arguments.rows)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--model", help="a checkpoint; default: random, of Llama 3.2 1B's shape")
    parser.add_argument("--exits", default="8,16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=15)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, measures, writes; 2 without a CUDA device, 1 if a test failed."""
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and a build of torch that finds it.", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"tests": run_tests()}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            make_random_llama(Path(folder))
        results["offline"] = run_offline(arguments.model or folder, arguments)
    device = {"name": torch.cuda.get_device_name(), "torch": torch.__version__}
    document = {"benchmark": "gpu_check", "environment": environment(), "device": device} | results
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 1 if results["tests"]["returncode"] else 0


if __name__ == "__main__":
    sys.exit(main())
