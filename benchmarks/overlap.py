"""What one step of overlap gains: the same requests with and without it, in turn.

Two engines share one model. Each answers so many requests, so many at once, A B A B ..., so that a
drift of the machine hits both alike; the figure is the median of the ratios of neighbours. The last
line is one JSON document.

    python -m benchmarks.overlap --rows 1 8 32
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Iterator, Sequence

from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.engine_alone import run_rows
from benchmarks.lib.workload import PromptMaker
from benchmarks.offline import add_engine_arguments
from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import SortserveError
from sortserve.core.request import Request
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.assemble import EngineOptions, assemble, start_threads
from sortserve.engine.engine import Engine

__all__ = ["main"]


def _requests(arguments: argparse.Namespace, engine: Engine, vocab_size: int) -> Iterator[Request]:
    prompts = PromptMaker(random.Random(arguments.seed), vocab_size=vocab_size)
    sampling = SamplingParams(
        temperature=arguments.temperature,
        max_tokens=arguments.output_tokens,
        ignore_eos=True,
        seed=arguments.seed,
    )
    for number in itertools.count():
        yield Request(
            request_id=str(number),
            prompt_token_ids=tuple(prompts.make(arguments.prompt_tokens)),
            sampling=sampling,
            arrival_s=engine.clock(),
        )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_arguments(parser)
    parser.add_argument("--exits", default="9,30")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 2 if the checkpoint cannot be served so."""
    arguments = parse_arguments(argv)
    start_threads(None)
    try:
        checkpoint = load_checkpoint(
            arguments.model,
            exits=[int(part) for part in arguments.exits.split(",")],
            dtype=arguments.dtype,
            device=arguments.device,
            quantize=arguments.quantize,
        )
        engines = [
            assemble(
                checkpoint,
                EngineOptions(
                    backend=arguments.backend,
                    max_model_len=arguments.prompt_tokens + arguments.output_tokens + 1,
                    max_num_seqs=max(arguments.rows),
                    enable_prefix_caching=False,
                    async_scheduling=overlaps,
                ),
            ).engine
            for overlaps in (False, True)
        ]
    except SortserveError as error:
        print(error, file=sys.stderr)
        return 2
    vocab_size = checkpoint.config.vocab_size
    requests = [_requests(arguments, engine, vocab_size) for engine in engines]

    def rate(which: int, exit_layer: int, num_rows: int) -> float:
        figures = run_rows(
            engines[which],
            requests[which],
            exit_layer=exit_layer,
            num_rows=num_rows,
            num_requests=2 * num_rows,
        )
        return figures["output_tokens_per_s"]

    results = []
    for exit_layer, num_rows in itertools.product(checkpoint.exits.layers, arguments.rows):
        pairs = [
            (rate(0, exit_layer, num_rows), rate(1, exit_layer, num_rows))
            for _ in range(arguments.rounds + 1)
        ][1:]  # the first one warms up
        without, with_overlap = (statistics.median(side) for side in zip(*pairs, strict=True))
        results.append(
            {
                "exit_layer": exit_layer,
                "rows": num_rows,
                "without": round(without, 1),
                "with": round(with_overlap, 1),
                "ratio": round(statistics.median(b / a for a, b in pairs), 3),
            }
        )
    print_table(
        ["exit", "rows", "tok/s without", "with overlap", "ratio"],
        ([*list(result.values())[:-1], f"{result['ratio']:.3f}"] for result in results),
    )
    print_json("overlap", arguments, environment(), {"figures": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
