"""Shallow and deep requests in one batch: what each policy gives each of them.

In lock-step batching a row that exits early still waits for the deepest row of its step, so a
shallow request saves arithmetic and gains no latency. This benchmark starts the server under one
policy after the other (A B A B, so that a drift of the machine hits both alike), keeps 16
closed-loop clients busy, half of them at a shallow exit and half at full depth, and prints the
median time per output token of each class. The last line is one JSON document.

    python -m benchmarks.mixed_depth --duration 30 --rounds 2
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.lib.common import environment, percentile, print_json, print_table
from benchmarks.lib.loadgen import Planned, RequestRecord, Run, run_closed_loop
from benchmarks.lib.server_process import ServerStartError, serve
from benchmarks.lib.workload import PromptMaker, RequestMaker, RequestSpec
from benchmarks.serving import detect_model

__all__ = ["main", "mixed_figures"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixed_depth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="default: the server's default")
    parser.add_argument("--exits", default="9,15,21,30", help="that the server opens")
    parser.add_argument("--shallow", type=int, default=9)
    parser.add_argument("--deep", type=int, default=30)
    parser.add_argument("--policies", nargs="+", default=["fair", "lockstep"])
    parser.add_argument("--rounds", type=int, default=2, help="times each policy is measured")
    parser.add_argument("--num-clients", type=int, default=16)
    parser.add_argument("--duration", type=float, default=30.0, help="seconds a round")
    parser.add_argument("--warmup", type=float, default=5.0, help="seconds, not counted")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="", help="more flags, separated by spaces")
    return parser.parse_args(argv)


def mixed_figures(runs: Sequence[Run], *, shallow: int, deep: int) -> dict[str, Any]:
    """Figures of one policy over all its rounds.

    Raises:
        ValueError: no request of a class was finished; measure for longer.
    """
    wall_s = sum(run.wall_s for run in runs)
    records = [record for run in runs for record in run.records]
    by_exit = {e: [r for r in records if r.exit_layer == e] for e in (shallow, deep)}
    medians = {e: _median_tpot_ms(of_exit, e) for e, of_exit in by_exit.items()}
    return {
        "shallow_tpot_ms": round(medians[shallow], 3),
        "deep_tpot_ms": round(medians[deep], 3),
        "tpot_ratio": round(medians[shallow] / medians[deep], 4),
        "output_tokens_per_s": round(sum(r.num_output_tokens for r in records) / wall_s, 2),
        "shallow_tokens_per_s": round(
            sum(r.num_output_tokens for r in by_exit[shallow]) / wall_s, 2
        ),
        "deep_tokens_per_s": round(sum(r.num_output_tokens for r in by_exit[deep]) / wall_s, 2),
        "num_finished": sum(record.ok for record in records),
        "num_failed": sum(record.error is not None for record in records),
    }


def _median_tpot_ms(records: Sequence[RequestRecord], exit_layer: int) -> float:
    tpots = [record.tpot_s for record in records if record.ok and record.tpot_s is not None]
    if not tpots:
        errors = {record.error for record in records if record.error is not None}
        raise ValueError(f"no request at exit {exit_layer} finished: {errors or 'run longer'}")
    return percentile(tpots, 0.5) * 1e3


async def _measure(arguments: argparse.Namespace, policy: str, seed: int) -> Run:
    model = [arguments.model] if arguments.model else []
    flags = ["--policy", policy, "--exits", arguments.exits, *arguments.server_args.split()]
    async with serve([*model, *flags]) as client:
        maker = RequestMaker(
            model=await detect_model(client),
            prompts=PromptMaker(random.Random(seed), vocab_size=arguments.vocab_size),
        )
        plans = _plans(arguments, maker)
        await run_closed_loop(client, plans, duration_s=arguments.warmup)
        return await run_closed_loop(client, plans, duration_s=arguments.duration)


def _plans(arguments: argparse.Namespace, maker: RequestMaker) -> list[Iterator[Planned]]:
    spec = RequestSpec(
        num_prompt_tokens=arguments.prompt_tokens, num_output_tokens=arguments.output_tokens
    )

    def endless(exit_layer: int) -> Iterator[Planned]:
        while True:
            yield Planned(maker.make(spec, exit_layer), exit_layer)

    exits = itertools.cycle((arguments.shallow, arguments.deep))
    return [endless(e) for e in itertools.islice(exits, arguments.num_clients)]


async def _measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[Run]] = {policy: [] for policy in arguments.policies}
    for round_ in range(arguments.rounds):
        for policy in arguments.policies:
            print(f"round {round_ + 1}: {policy} ...", flush=True)
            runs[policy].append(await _measure(arguments, policy, arguments.seed + round_))
    return {
        policy: mixed_figures(done, shallow=arguments.shallow, deep=arguments.deep)
        for policy, done in runs.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Measures every policy and prints them side by side."""
    arguments = parse_arguments(argv)
    described = environment()
    try:
        figures = asyncio.run(_measure_all(arguments))
    except (ServerStartError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    names = list(next(iter(figures.values())))
    rows = ([name, *(_show(figures[policy][name]) for policy in figures)] for name in names)
    print_table(["figure", *figures], rows)
    print_json("mixed_depth", arguments, described, figures)
    return 0


def _show(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
