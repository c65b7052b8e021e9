"""What serving costs: tokens per second over HTTP beside those of the engine alone.

The same work, 128 tokens in and 128 out at full depth, is done by the engine in a process of its
own and by a server that streams to so many clients, in turn (A B A B, so that a drift of the
machine hits both alike). The load generator runs on the same cores, and what it takes of them
counts against the server. ``ratio`` is the server's share of the engine's tokens per second, the
median of the rounds. The shares of CPU are in cores: of the server, of its event loop, of the
generator. The last line is one JSON document.

    python -m benchmarks.service_cost --num-clients 1 8 32 --rounds 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.cpu_time import main_thread_share, process_share, thread_times
from benchmarks.lib.loadgen import Planned, run_closed_loop
from benchmarks.lib.report import report
from benchmarks.lib.server_process import RunningServer, ServerStartError, start_server
from benchmarks.lib.workload import PromptMaker, RequestMaker, RequestSpec
from benchmarks.serving import detect_model

__all__ = ["main"]

DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "checkpoints/sorted-smollm2-135m"
WHOLE_RUNS = 2
"""Each client sends so many requests in a round: the second finds the others at work."""


class EngineAlone:
    """The engine's process, which waits while the server is measured."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.full_depth = 0

    @classmethod
    @contextmanager
    def start(cls, arguments: argparse.Namespace) -> Iterator[EngineAlone]:
        """Load the model; ready when this is entered.

        Raises:
            ServerStartError: the process ended.
        """
        names = (
            "model",
            "dtype",
            "quantize",
            "seed",
            "prompt_tokens",
            "output_tokens",
            "vocab_size",
        )
        flags = [f"--{n.replace('_', '-')}={getattr(arguments, n)}" for n in names]
        command = [sys.executable, "-m", "benchmarks.lib.engine_alone", *flags]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            engine = cls(process)
            engine.full_depth = int(engine._read())
            try:
                yield engine
            finally:
                assert process.stdin is not None
                process.stdin.close()

    def run(self, exit_layer: int, num_rows: int) -> dict[str, float]:
        """One round; see ``engine_alone.run_rows``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{exit_layer} {num_rows} {WHOLE_RUNS * num_rows}\n")
        self._process.stdin.flush()
        figures: dict[str, float] = json.loads(self._read())
        return figures

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServerStartError(f"the engine alone ended with {self._process.wait()}")
        return line


async def _run_http(
    server: RunningServer, maker: RequestMaker, arguments: argparse.Namespace, num_clients: int
) -> dict[str, float]:
    """One round over HTTP, as the engine's: each client sends its next request after its last."""
    spec = RequestSpec(
        num_prompt_tokens=arguments.prompt_tokens, num_output_tokens=arguments.output_tokens
    )
    # The exit is named: a server that has too much to do would choose a shallower one.
    exit_layer = arguments.exit_layer
    bodies = [Planned(maker.make(spec, exit_layer)) for _ in range(WHOLE_RUNS * num_clients)]
    plans = [iter(bodies[i::num_clients]) for i in range(num_clients)]
    before = thread_times(server.pid)
    run = await run_closed_loop(server.client, plans, num_requests=len(bodies))
    after = thread_times(server.pid)
    figures = report(run)
    if figures["num_failed"]:
        raise ServerStartError(f"{figures['num_failed']} requests failed: {figures['errors']}")
    return {
        "output_tokens_per_s": figures["output_tokens_per_s"],
        "server_cpu_share": process_share(before, after, run.wall_s),
        "event_loop_cpu_share": main_thread_share(server.pid, before, after, run.wall_s),
        "generator_cpu_share": figures["generator_cpu_share"],
    }


async def _measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rounds: dict[int, list[dict[str, float]]] = defaultdict(list)
    prompts = PromptMaker(random.Random(arguments.seed + 1), vocab_size=arguments.vocab_size)
    flags = [arguments.model, "--dtype", arguments.dtype, "--quantize", arguments.quantize]
    flags += arguments.server_args.split()
    with EngineAlone.start(arguments) as engine:
        async with start_server(flags) as server:
            maker = RequestMaker(model=await detect_model(server.client), prompts=prompts)
            arguments.exit_layer = arguments.exit_layer or engine.full_depth
            await _run_http(server, maker, arguments, 2)  # warm-up
            engine.run(arguments.exit_layer, 2)
            for _ in range(arguments.rounds):
                for num_clients in arguments.num_clients:
                    alone = engine.run(arguments.exit_layer, num_clients)
                    http = await _run_http(server, maker, arguments, num_clients)
                    rounds[num_clients].append(_compared(alone, http))
    return [_summary(n, measured) for n, measured in rounds.items()]


def _compared(alone: dict[str, float], http: dict[str, float]) -> dict[str, float]:
    return {
        "engine_tokens_per_s": alone["output_tokens_per_s"],
        "http_tokens_per_s": http.pop("output_tokens_per_s"),
        "ratio": 0.0,
        "engine_cpu_share": alone["cpu_share"],
        **http,
    }


def _summary(num_clients: int, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """The medians of all rounds, and the spread of the ratio."""
    for figures in rounds:
        figures["ratio"] = figures["http_tokens_per_s"] / figures["engine_tokens_per_s"]
    ratios = [round(figures["ratio"], 3) for figures in rounds]
    medians = {name: round(statistics.median(f[name] for f in rounds), 3) for name in rounds[0]}
    return {"num_clients": num_clients, **medians, "ratios": ratios}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--num-clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--exit", type=int, dest="exit_layer", help="default: full depth")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="", help="more flags, separated by spaces")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; 1 if the server or the engine did not start or failed."""
    arguments = parse_arguments(argv)
    described = environment()
    try:
        figures = asyncio.run(_measure(arguments))
    except (ServerStartError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    columns = [name for name in figures[0] if name != "ratios"]
    print_table(columns, ([f"{row[c]:g}" for c in columns] for row in figures))
    print_json("service_cost", arguments, described, {"rounds": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
