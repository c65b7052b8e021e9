"""What choosing the next tokens costs, beside reading the logits once and beside the whole step.

The logits are the model's own: half of the prompts are pieces of this repository's README, half are
random tokens, because a filter has more to do where the model is less sure. Every kind of request
samples its rows over and over, and each row keeps its tokens, as in a server. Rounds go over all
kinds in turn, so that a drift of the machine hits all alike. ``floor_ms`` is what it takes to read
the logits once at the memory's rate (lib/floors.py), ``step_ms`` a decode step of as many greedy
rows at full depth (its sampling counted). The last line is one JSON document.

    python -m benchmarks.sampling --rows 1 8 64
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.common import ROOT, environment, print_json, print_table
from benchmarks.lib.floors import Work, measure_machine
from benchmarks.offline import EngineBench, add_engine_arguments
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.errors import SortserveError
from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import SampledToken, SamplingParams, SamplingRow
from sortserve.engine.assemble import make_tokenizer
from sortserve.engine.runner import ModelRunner
from sortserve.engine.sampling.bitmask import Masks
from sortserve.engine.sampling.sampler import Sampler
from sortserve.engine.sampling.samples import KnownSamples, Samples
from sortserve.model.backend import RowSampling

__all__ = ["KINDS", "main"]

PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "greedy, penalties": {"temperature": 0.0, **PENALTIES},
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "greedy, bias of 300": {"temperature": 0.0, "logit_bias": dict.fromkeys(range(300), -1.0)},
    "everything": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
        **PENALTIES,
        "logprobs": 5,
        "logit_bias": dict.fromkeys(range(300), -1.0),
        "min_tokens": 100_000,
    },
}
"""The kinds of requests that are timed, each over all rows of a batch."""
MAX_TOKENS = 1_000_000
BLOCK_SIZE = 16
STOP_IDS = frozenset({0, 2})


class Recorder(Sampler):
    """Keeps a copy of the logits that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_RV = torch.empty(0)

    def start(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None
    ) -> Samples:
        """See Sampler."""
        self.logits_RV = logits_RV.clone()
        return KnownSamples([SampledToken(0)] * len(rows))


def prompts_of(checkpoint: LoadedCheckpoint, num_rows: int, length: int) -> list[list[int]]:
    """Pieces of the README and random tokens, in turn."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokens = make_tokenizer(checkpoint).encode(text)
    rng = random.Random(0)
    prompts = []
    for r in range(num_rows):
        if r % 2:
            prompts.append([rng.randrange(checkpoint.config.vocab_size) for _ in range(length)])
        else:
            start = rng.randrange(len(tokens) - length)
            prompts.append(list(tokens[start : start + length]))
    return prompts


def logits_of(bench: EngineBench, prompts: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Logits [R, V] after each prompt at full depth."""
    decoder, recorder = bench.decoder, Recorder()
    num_blocks = -(-max(map(len, prompts)) // BLOCK_SIZE)
    pages = np.arange(decoder.num_slabs * num_blocks, dtype=np.int32)
    runner = ModelRunner(decoder, num_pages=len(pages), block_size=BLOCK_SIZE, sampler=recorder)
    logits = []
    for prompt in prompts:
        row = RowPlan(
            request_id="benchmark",
            exit_layer=decoder.config.num_layers,
            start=0,
            token_ids=prompt,
            block_table_SB=pages.reshape(decoder.num_slabs, -1),
            sampling=SamplingRow(SamplingParams(), 0, prompt, [], frozenset()),
        )
        runner.execute(StepPlan(rows=(row,), depth_cap=row.exit_layer))
        logits.append(recorder.logits_RV)
    return torch.cat(logits)


class Batch:
    """Rows of one kind that sample again and again."""

    def __init__(
        self,
        logits_RV: Tensor,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        fast: RowSampling | None,
    ) -> None:
        self._logits_RV = logits_RV
        self._outputs: list[list[int]] = [list(prompt[::2]) for prompt in prompts]
        self._rows = [
            SamplingRow(params, seed, tuple(prompt[1::2]), output, STOP_IDS)
            for seed, (prompt, output) in enumerate(zip(prompts, self._outputs, strict=True))
        ]
        self._sampler = Sampler(fast)

    def sample_s(self) -> float:
        """Seconds of one step's sampling; every row then has one token more."""
        logits_RV = self._logits_RV.clone()
        started_s = time.perf_counter()
        sampled = self._sampler.sample(logits_RV, self._rows)
        seconds = time.perf_counter() - started_s
        for output, token in zip(self._outputs, sampled, strict=True):
            assert isinstance(token, SampledToken)
            output.append(token.token_id)
        return seconds


def _measure(bench: EngineBench, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    arguments = bench.arguments
    prompts = prompts_of(checkpoint, max(arguments.rows), arguments.history)
    logits_RV = logits_of(bench, prompts, checkpoint.config.vocab_size)
    kinds = {kind: KINDS[kind] for kind in arguments.kinds or KINDS}
    machine = measure_machine(bench.device, bench.dtype)
    results: dict[str, Any] = {}
    for num_rows in arguments.rows:
        part_RV = logits_RV[:num_rows]
        batches = {
            kind: Batch(
                part_RV,
                prompts[:num_rows],
                SamplingParams(max_tokens=MAX_TOKENS, **options),
                bench.decoder.backend.sampling,
            )
            for kind, options in kinds.items()
        }
        sampling_s: dict[str, list[float]] = defaultdict(list)
        step_s: list[float] = []
        for _ in range(arguments.rounds):
            step_s += bench.decode_step_times(checkpoint.exits.layers[-1], num_rows)
            for kind, batch in batches.items():
                batch.sample_s()  # warm-up, and the tokens of its rows are counted
                sampling_s[kind] += [batch.sample_s() for _ in range(arguments.samples)]
        floor_s = machine.memory_floor_s(Work(num_bytes=part_RV.nbytes, num_flops=0))
        results[str(num_rows)] = _figures(step_s, floor_s, sampling_s)
    return {"dtype": str(bench.dtype).removeprefix("torch."), "rows": results}


def _figures(
    step_s: Sequence[float], floor_s: float, sampling_s: dict[str, list[float]]
) -> dict[str, Any]:
    step_ms, floor_ms = 1e3 * statistics.median(step_s), 1e3 * floor_s
    return {
        "step_ms": round(step_ms, 2),
        "floor_ms": round(floor_ms, 3),
        "kinds": {
            kind: {
                "sampling_ms": round(1e3 * (median_s := statistics.median(times)), 3),
                "best_ms": round(1e3 * min(times), 3),
                "times_floor": round(1e3 * median_s / floor_ms, 1),
                "percent_of_step": round(1e5 * median_s / step_ms, 1),
            }
            for kind, times in sampling_s.items()
        },
    }


def _print(results: dict[str, Any]) -> None:
    for num_rows, figures in results["rows"].items():
        print(f"{num_rows} rows: step {figures['step_ms']} ms, floor {figures['floor_ms']} ms")
        columns = ["sampling_ms", "best_ms", "times_floor", "percent_of_step"]
        lines = ([kind, *(at[c] for c in columns)] for kind, at in figures["kinds"].items())
        print_table(["kind", *columns], lines)
        print()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), metavar="KIND")
    parser.add_argument("--history", type=int, default=1000, help="tokens each row has already")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of the step's rows")
    parser.add_argument("--steps", type=int, default=8, help="decode steps a round")
    parser.add_argument("--samples", type=int, default=8, help="times each kind samples a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.prefill_tokens = arguments.history
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 2 if the checkpoint cannot be served so."""
    arguments = parse_arguments(argv)
    described = environment()
    try:
        checkpoint = load_checkpoint(
            arguments.model,
            dtype=arguments.dtype,
            device=arguments.device,
            quantize=arguments.quantize,
        )
        bench = EngineBench(checkpoint, arguments)
    except SortserveError as error:
        print(error, file=sys.stderr)
        return 2
    results = _measure(bench, checkpoint)
    _print(results)
    print_json("sampling", arguments, described, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
