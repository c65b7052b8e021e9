"""An engine without HTTP in a process of its own: it answers rounds of requests, step by step.

The other half of ``benchmarks.service_cost``. Its first line says how deep the model is. Then each
line of its input names an exit, a number of rows and a number of requests: so many rows are always
live, each replaced when it ends, as closed-loop clients would. The answer is one line of JSON.
Between two lines it waits, and takes no time from anybody.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator

from benchmarks.lib.workload import PromptMaker
from sortserve.admission.choose import ExitChoice
from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.request import Request
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.assemble import EngineOptions, assemble, start_threads
from sortserve.engine.engine import Engine

__all__ = ["main", "run_rows"]


def run_rows(
    engine: Engine,
    requests: Iterator[Request],
    *,
    exit_layer: int,
    num_rows: int,
    num_requests: int,
) -> dict[str, float]:
    """Answer so many requests at an exit, ``num_rows`` of them at once.

    Returns:
        ``output_tokens_per_s`` and ``cpu_share``, the cores that this process kept busy.
    """
    todo = itertools.islice(requests, num_requests)

    def add(most: int) -> None:
        for request in itertools.islice(todo, most):
            engine.add_request(request, ExitChoice(exit_layer, estimate=None, fits=True))

    num_tokens = 0
    started_s, cpu_s = time.perf_counter(), time.process_time()
    add(num_rows)
    while engine.has_work:
        outputs = engine.step()
        num_tokens += sum(len(output.tokens) for output in outputs)
        add(sum(output.finish_reason is not None for output in outputs))
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    return {"output_tokens_per_s": num_tokens / wall_s, "cpu_share": cpu_s / wall_s}


def _requests(arguments: argparse.Namespace, engine: Engine, vocab_size: int) -> Iterator[Request]:
    prompts = PromptMaker(random.Random(arguments.seed), vocab_size=vocab_size)
    sampling = SamplingParams(temperature=0.0, max_tokens=arguments.output_tokens, ignore_eos=True)
    for number in itertools.count():
        yield Request(
            request_id=str(number),
            prompt_token_ids=tuple(prompts.make(arguments.prompt_tokens)),
            sampling=sampling,
            arrival_s=engine.clock(),
        )


def main(argv: list[str] | None = None) -> int:
    """Loads, and answers until its input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lib.engine_alone")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=32000)
    arguments = parser.parse_args(argv)
    start_threads(None)
    checkpoint = load_checkpoint(
        arguments.model, dtype=arguments.dtype, quantize=arguments.quantize
    )
    parts = assemble(checkpoint, EngineOptions(), release_weights=True)
    parts.calibrate(adapt_threads=True)  # as a server does
    requests = _requests(arguments, parts.engine, arguments.vocab_size)
    print(parts.engine.exits.full, flush=True)
    for line in sys.stdin:
        exit_layer, num_rows, num_requests = map(int, line.split())
        figures = run_rows(
            parts.engine,
            requests,
            exit_layer=exit_layer,
            num_rows=num_rows,
            num_requests=num_requests,
        )
        print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
