"""Load generator for any server with OpenAI's completions route: ours, vLLM, llama.cpp.

Closed loop (``--num-clients``): each client sends its next request when its last one is answered;
the throughput of a busy server. Open loop (``--rate`` or ``--trace``): requests are sent when they
are due, whatever the server does; the latency a service would see. Every request streams, is
greedy, has a prompt of random token ids of exact length, and ignores end-of-sequence, so that all
servers do the same work. The last line of the output is one JSON document.

    python -m benchmarks.serving --url http://127.0.0.1:8000 --num-clients 32 --num-requests 128
    python -m benchmarks.serving --url http://127.0.0.1:8000 --rate 4 --duration 60 --budget-ms 800
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lib.common import environment, print_json
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.loadgen import Planned, Run, run_closed_loop, run_open_loop
from benchmarks.lib.report import print_report, report
from benchmarks.lib.workload import (
    ExitMix,
    PromptMaker,
    RequestMaker,
    RequestSpec,
    fixed_arrivals,
    load_trace,
    poisson_arrivals,
)

__all__ = ["detect_model", "main", "parse_arguments"]

DRAIN_S = 300.0
"""How long an open loop waits for its last answers before it cuts them."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first model of /v1/models")
    parser.add_argument("--api-key")
    parser.add_argument("--seed", type=int, default=0)
    load = parser.add_argument_group("load: exactly one of --num-clients, --rate, --trace")
    kind = load.add_mutually_exclusive_group(required=True)
    kind.add_argument("--num-clients", type=int, help="closed loop with this many clients")
    kind.add_argument("--rate", type=float, help="open loop with this many requests a second")
    kind.add_argument("--trace", type=Path, help="open loop from JSON lines: t, *_tokens")
    load.add_argument("--arrivals", choices=("poisson", "fixed"), default="poisson")
    load.add_argument("--trace-speed", type=float, default=1.0, help="2 replays twice as fast")
    load.add_argument("--num-requests", type=int)
    load.add_argument("--duration", type=float, help="seconds; unfinished answers are cut")
    load.add_argument("--warmup", type=int, default=8, help="requests sent before, not counted")
    shape = parser.add_argument_group("requests")
    shape.add_argument("--prompt-tokens", type=int, default=128, help="with --trace: the maximum")
    shape.add_argument("--output-tokens", type=int, default=128, help="with --trace: the maximum")
    shape.add_argument("--shared-prefix", type=int, default=0, help="tokens all prompts share")
    shape.add_argument("--vocab-size", type=int, default=32000, help="ids are drawn below this")
    shape.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON")
    budget = parser.add_argument_group("budget")
    depth = budget.add_mutually_exclusive_group()
    depth.add_argument("--exit", type=int, dest="exit_layer", help="every request at this exit")
    depth.add_argument("--exits", type=ExitMix.parse, default=ExitMix(), metavar="9:0.5,30:0.5")
    budget.add_argument("--budget-ms", type=float, help="latency_ms: the whole answer")
    budget.add_argument("--ttft-ms", type=float)
    budget.add_argument("--tpot-ms", type=float)
    budget.add_argument("--on-miss", choices=("degrade", "truncate", "reject"))
    budget.add_argument("--grade-only", action="store_true", help="judge by it, do not send it")
    arguments = parser.parse_args(argv)
    if arguments.exit_layer is not None:
        arguments.exits = ExitMix(((arguments.exit_layer, 1.0),))
    if arguments.trace is None and arguments.num_requests is None and arguments.duration is None:
        parser.error("the load needs an end: give --num-requests or --duration")
    return arguments


async def detect_model(client: HttpClient) -> str:
    """The name of the first model that the server lists.

    Raises:
        OSError: the server does not answer with a list of models.
    """
    response = await client.request("GET", "/v1/models")
    try:
        return str(response.json()["data"][0]["id"])
    except (TypeError, KeyError, IndexError):
        raise OSError(f"GET /v1/models: HTTP {response.status}; give --model") from None


def _budget(arguments: argparse.Namespace) -> dict[str, Any]:
    times = {
        "latency_ms": arguments.budget_ms,
        "ttft_ms": arguments.ttft_ms,
        "tpot_ms": arguments.tpot_ms,
    }
    given = {name: value for name, value in times.items() if value is not None}
    return given | ({"on_miss": arguments.on_miss} if arguments.on_miss else {})


def _spec(arguments: argparse.Namespace, due_s: float = 0.0) -> RequestSpec:
    return RequestSpec(
        num_prompt_tokens=arguments.prompt_tokens,
        num_output_tokens=arguments.output_tokens,
        due_s=due_s,
    )


def _open_specs(arguments: argparse.Namespace, rng: random.Random) -> Iterator[RequestSpec]:
    if arguments.trace is not None:
        specs: Iterator[RequestSpec] = iter(
            load_trace(
                arguments.trace,
                num_requests=arguments.num_requests,
                speed=arguments.trace_speed,
                max_prompt_tokens=arguments.prompt_tokens,
                max_output_tokens=arguments.output_tokens,
            )
        )
    else:
        poisson = arguments.arrivals == "poisson"
        rate = arguments.rate
        due = poisson_arrivals(rate, rng) if poisson else fixed_arrivals(rate)
        specs = (_spec(arguments, due_s) for due_s in itertools.islice(due, arguments.num_requests))
    end_s = arguments.duration
    return itertools.takewhile(lambda spec: end_s is None or spec.due_s < end_s, specs)


def _closed_plans(
    arguments: argparse.Namespace, maker: RequestMaker, num_clients: int
) -> list[Iterator[Planned]]:
    """Each client keeps to one exit, so that every class always has the same number of clients."""

    def endless(exit_layer: int | None) -> Iterator[Planned]:
        while True:
            yield Planned(maker.make(_spec(arguments), exit_layer), exit_layer)

    return [endless(exit_layer) for exit_layer in arguments.exits.spread(num_clients)]


async def _measure(arguments: argparse.Namespace, client: HttpClient) -> Run:
    rng = random.Random(arguments.seed)
    arguments.model = arguments.model or await detect_model(client)
    maker = RequestMaker(
        model=arguments.model,
        prompts=PromptMaker(
            rng, vocab_size=arguments.vocab_size, shared_prefix=arguments.shared_prefix
        ),
        budget={} if arguments.grade_only else _budget(arguments),
        extra_body=arguments.extra_body,
    )
    num_clients = arguments.num_clients or 4
    if arguments.warmup:
        plans = _closed_plans(arguments, maker, num_clients)
        await run_closed_loop(client, plans, num_requests=arguments.warmup)
    if arguments.num_clients is not None:
        return await run_closed_loop(
            client,
            _closed_plans(arguments, maker, num_clients),
            num_requests=arguments.num_requests,
            duration_s=arguments.duration,
        )
    plan = []
    for spec in _open_specs(arguments, rng):
        exit_layer = arguments.exits.draw(rng)
        plan.append(Planned(maker.make(spec, exit_layer), exit_layer, spec.due_s))
    return await run_open_loop(client, plan, timeout_s=(plan[-1].due_s if plan else 0.0) + DRAIN_S)


def main(argv: list[str] | None = None) -> int:
    """Runs the load and prints the figures; 1 if no request was answered."""
    arguments = parse_arguments(argv)
    described = environment()
    client = HttpClient(arguments.url, api_key=arguments.api_key)
    try:
        run = asyncio.run(_measure(arguments, client))
    except OSError as error:
        print(f"{arguments.url}: {error}", file=sys.stderr)
        return 1
    figures = report(run, _budget(arguments))
    print_report(figures)
    print_json("serving", arguments, described, figures)
    return 0 if figures["num_finished"] else 1


if __name__ == "__main__":
    sys.exit(main())
