"""More load than can be served: clean refusals, promises still kept, flat memory, recovery.

Replays a trace at a rate beyond what the server sustains (``benchmarks.goodput`` finds that) for so
many seconds, with the same budgets and grades as there. Reads the server's memory and queue from
``GET /metrics`` all the while, and afterwards how long until nothing is left, and whether a tight
budget is promised and kept at once. The last line is one JSON document.

    python -m benchmarks.overload trace.jsonl --rate 8 --seconds 120
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.budget_classes import CLASSES, Budgeted, Unloaded, scaled
from benchmarks.lib.common import environment, metric_total, print_json, print_table
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.loadgen import Planned, run_open_loop
from benchmarks.lib.replay import figures, measure_alone, plan_requests, read_exits
from benchmarks.lib.server_process import ServerStartError, serve
from benchmarks.lib.systems import SYSTEMS
from benchmarks.lib.workload import PromptMaker, RequestMaker, RequestSpec, load_trace
from benchmarks.serving import detect_model

__all__ = ["main"]

SAMPLE_S = 2.0
DRAIN_S = 60.0
SHOWN = (
    *("num_requests", "statuses", "met_of_admitted", "quality_goodput", "goodput_share"),
    "refused_share",
    *("refusal_ms_p50", "refusal_ms_p99", "mean_depth_share", "output_tokens_per_s"),
    *("max_running", "max_waiting", "drain_s"),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, help="JSON lines: t, prompt_tokens, output_tokens")
    parser.add_argument("--model", help="default: the server's default")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--lengths", type=float, default=0.25, help="scale of the trace's lengths")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--on-miss", choices=("reject", "degrade"), default="reject")
    parser.add_argument("--min-quality", type=float, default=0.5, help="floor of every budget")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="", help="more flags, separated by spaces")
    return parser.parse_args(argv)


async def read_state(client: HttpClient) -> dict[str, float]:
    """Memory in MiB, requests running and waiting."""
    text = (await client.request("GET", "/metrics")).body.decode()
    resident = metric_total(text, "process_resident_memory_bytes")
    return {
        "memory_mib": (resident or 0.0) / 2**20,
        "running": metric_total(text, "sortserve_num_requests_running") or 0.0,
        "waiting": metric_total(text, "sortserve_num_requests_waiting") or 0.0,
    }


async def watch(client: HttpClient, states: list[dict[str, float]]) -> None:
    """A state every ``SAMPLE_S`` seconds, until cancelled."""
    while True:
        states.append(await read_state(client))
        await asyncio.sleep(SAMPLE_S)


async def drain_s(client: HttpClient) -> float | None:
    """Seconds until nothing runs or waits; None if that takes more than ``DRAIN_S``."""
    started_s = time.perf_counter()
    while (waited_s := time.perf_counter() - started_s) < DRAIN_S:
        state = await read_state(client)
        if not state["running"] and not state["waiting"]:
            return waited_s
        await asyncio.sleep(0.1)
    return None


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole story on one server."""
    num_requests = round(arguments.rate * arguments.seconds)
    model = [arguments.model] if arguments.model else []
    async with serve([*model, *arguments.server_args.split()]) as client:
        prompts = PromptMaker(random.Random(arguments.seed), vocab_size=arguments.vocab_size)
        maker = RequestMaker(model=await detect_model(client), prompts=prompts)
        exits = await read_exits(client)
        unloaded = (await measure_alone(client, maker, exits.layers[-1])).unloaded
        specs = scaled(
            load_trace(arguments.trace, num_requests=num_requests),
            lengths=arguments.lengths,
            rate=arguments.rate,
            max_prompt_tokens=arguments.max_prompt_tokens,
        )
        planned, budgets = plan_requests(
            specs,
            maker,
            unloaded,
            SYSTEMS["quality"],
            exits,
            seed=arguments.seed,
            on_miss=arguments.on_miss,
            min_quality=arguments.min_quality,
        )
        states: list[dict[str, float]] = []
        watching = asyncio.create_task(watch(client, states))
        run = await run_open_loop(client, planned)
        watching.cancel()
        drained_s = await drain_s(client)
        planned, tight = plan_tight(maker, unloaded)
        after = figures(await run_open_loop(client, planned), *tight, unloaded, exits)
    return {
        "num_requests": num_requests,
        **figures(run, specs, budgets, unloaded, exits),
        "statuses": dict(Counter(str(record.status) for record in run.records)),
        "memory_mib": [round(state["memory_mib"]) for state in states],
        "max_running": max(state["running"] for state in states),
        "max_waiting": max(state["waiting"] for state in states),
        "drain_s": None if drained_s is None else round(drained_s, 2),
        "after": {key: after[key] for key in ("goodput_share", "mean_depth_share")},
    }


def plan_tight(
    maker: RequestMaker, unloaded: Unloaded
) -> tuple[list[Planned], tuple[list[RequestSpec], list[Budgeted]]]:
    """Five requests with tight budgets, two seconds apart, and what they are graded by."""
    tight = CLASSES[0]
    specs = [
        RequestSpec(num_prompt_tokens=128, num_output_tokens=32, due_s=2.0 * i) for i in range(5)
    ]
    budgets = [Budgeted(tight.budget(unloaded, spec, "reject"), tight) for spec in specs]
    planned = []
    for spec, budget in zip(specs, budgets, strict=True):
        own = RequestMaker(model=maker.model, prompts=maker.prompts, budget=budget.budget)
        planned.append(Planned(own.make(spec, None), None, spec.due_s))
    return planned, (specs, budgets)


def quarters(samples: Sequence[float]) -> str:
    """The first sample, those at a quarter, a half and three, and the last."""
    last = len(samples) - 1
    return ", ".join(f"{samples[round(last * i / 4)]:g}" for i in range(5))


def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    arguments = parse_arguments(argv)
    described = environment()
    try:
        results = asyncio.run(measure(arguments))
    except (ServerStartError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    shown = {
        **{key: results[key] for key in SHOWN},
        "memory in MiB, in quarters": quarters(results["memory_mib"]),
        "met at once afterwards": results["after"]["goodput_share"],
    }
    print_table(["figure", "value"], [[key, str(value)] for key, value in shown.items()])
    print_json("overload", arguments, described, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
