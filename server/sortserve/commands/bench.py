"""``sortserve bench``: a load on a running server, and what its clients saw."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sortserve.commands.asking import (
    add_budget_flags,
    add_server_flags,
    budget_of,
    client_errors,
    first_key,
)
from sortserve.commands.bench_figures import Bounds, figures, figures_text
from sortserve.core.errors import ConfigError
from sortserve.process.arguments import Parser, finite_number, integer
from sortserve.process.console import FAILED

if TYPE_CHECKING:
    from sortserve.commands.bench_figures import Seen
    from sortserve.commands.bench_load import Load
    from sortserve_client import AsyncClient

__all__ = ["bench_command", "bench_parser"]

DEFAULT_CLIENTS = 4
R = TypeVar("R")


def bench_parser() -> Parser:
    """The command line of ``sortserve bench``."""
    parser = Parser(
        prog="sortserve bench",
        description="Send requests of random tokens to a running server, and print what its "
        "clients saw: TTFT, TPOT, NTPOT, the gaps between tokens (ITL), the whole answer (E2E), "
        "and, if the budget has a time, how many met it. Latencies count from when a request was "
        "due.",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--clients",
        type=integer,
        metavar="N",
        help="so many clients, each of which waits for its answer before it asks again; "
        f"default: {DEFAULT_CLIENTS}",
    )
    load.add_argument(
        "--rate",
        type=finite_number,
        metavar="R",
        help="instead: R requests a second at random times, however many are unanswered",
    )
    load.add_argument(
        "--curve",
        type=_counts,
        metavar="N,N,...",
        help="instead: so many clients one after the other, at each exit (or at --exit); prints "
        "the tokens a second of all over those of one user",
    )
    load.add_argument("--plot", type=Path, metavar="FILE", help="draw --curve as an SVG")
    load.add_argument("--num-requests", type=integer, default=32, metavar="N", help="default: 32")
    load.add_argument(
        "--warmup", type=integer, default=2, metavar="N", help="not counted, before; default: 2"
    )
    load.add_argument(
        "--prompt-tokens", type=integer, default=128, metavar="N", help="default: 128"
    )
    load.add_argument(
        "--max-tokens", type=integer, default=64, metavar="N", help="of an answer; default: 64"
    )
    load.add_argument(
        "--stop-early",
        action="store_true",
        help="let the model end its answers; by default each has --max-tokens",
    )
    load.add_argument("--temperature", type=finite_number, metavar="T", help="0 is greedy")
    load.add_argument("--seed", type=integer, default=0, metavar="SEED", help="default: 0")
    load.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    add_budget_flags(parser)
    server = add_server_flags(parser)
    server.add_argument("--model", metavar="NAME", help="served name, or NAME@EXIT")
    return parser


def bench_command(arguments: Sequence[str]) -> int:
    """Run the load and print the figures; returns the exit code: 1 if nothing was answered.

    Raises:
        ConfigError: a flag is wrong.
        CommandFailedError: there is no server.
    """
    options = bench_parser().parse_args(arguments)
    _check(options)
    with client_errors(options.url):
        budget = budget_of(options)
        if options.curve is not None:
            return _curve(options)
        records, wall_s, cpu_s = asyncio.run(_run(options))
    bounds = Bounds(latency_ms=budget.latency_ms, ttft_ms=budget.ttft_ms, tpot_ms=budget.tpot_ms)
    values = figures(records, wall_s=wall_s, cpu_s=cpu_s, bounds=bounds)
    print(json.dumps(values) if options.json else figures_text(values))
    return FAILED if values["num_failed"] == values["num_requests"] else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what is no load.

    Raises:
        ConfigError: a flag is not allowed.
    """
    given = [n for n in ("clients", "rate", "curve") if getattr(options, n) is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} exclude each other.")
    if options.plot is not None and options.curve is None:
        raise ConfigError("--plot draws a curve: give --curve, too.")
    for flag in ("clients", "rate", "num_requests", "prompt_tokens", "max_tokens"):
        value = getattr(options, flag)
        if value is not None and value <= 0:
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError(f"{name} {value:g} is not allowed: it must be above 0.")
    if options.warmup < 0:
        raise ConfigError(f"--warmup {options.warmup} is not allowed: it must be 0 or more.")


def _counts(text: str) -> list[int]:
    """An argument's type: numbers of clients, separated by commas."""
    counts = [integer(part.strip()) for part in text.split(",")]
    if any(count < 1 for count in counts):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: each number must be above 0")
    return counts


def _curve(options: argparse.Namespace) -> int:
    """Measure the interactivity curve and print it; returns the exit code."""
    from sortserve.commands.bench_curve import curve_svg, curve_text

    points = asyncio.run(_with_server(options, _points))
    print(json.dumps({"points": points}) if options.json else curve_text(points))
    if options.plot is not None:
        options.plot.write_bytes(curve_svg(points))
    return FAILED if all(p["num_failed"] == p["num_requests"] for p in points) else 0


async def _points(
    client: AsyncClient, load: Load, source: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    from sortserve.commands.bench_curve import run_curve

    exits = [info.exit_layer for info in await client.exits()]
    if load.budget.exit_layer is not None:
        exits = [load.budget.exit_layer]

    def measure(records: Sequence[Seen], wall_s: float) -> Any:
        return figures(records, wall_s=wall_s, cpu_s=0.0, bounds=Bounds())

    return await run_curve(
        client,
        load,
        source,
        exits=exits,
        clients=options.curve,
        measure=measure,
        clock=time.perf_counter,
        on_point=_progress(len(exits) * len(set(options.curve))),
    )


async def _run(options: argparse.Namespace) -> tuple[list[Seen], float, float]:
    """Warm up and measure; returns what was seen, wall time and own processor time (seconds)."""
    return await _with_server(options, _records)


async def _records(
    client: AsyncClient, load: Load, source: Any, options: argparse.Namespace
) -> tuple[list[Seen], float, float]:
    from sortserve.commands.bench_load import run_load

    started_s, cpu_s = time.perf_counter(), time.process_time()
    records = await run_load(client, load, source, _progress(options.num_requests))
    return records, time.perf_counter() - started_s, time.process_time() - cpu_s


async def _with_server(options: argparse.Namespace, measure: Callable[..., Awaitable[R]]) -> R:
    """Warm up, and give ``measure`` a client, the load, prompts and the options."""
    import httpx

    from sortserve.commands.bench_load import WORDS, Load, prompts, run_load
    from sortserve_client import AsyncClient

    sampling: dict[str, Any] = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "ignore_eos": not options.stop_early,
    }
    load = Load(
        num_requests=options.num_requests,
        num_clients=None if options.rate else options.clients or DEFAULT_CLIENTS,
        rate=options.rate,
        budget=budget_of(options),
        options=sampling,
        seed=options.seed,
    )
    # No request may wait for a connection: that would be counted as the server's time.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with (
        httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(limits=limits)) as http,
        AsyncClient(
            options.url, first_key(options.api_key), max_retries=0, http_client=http
        ) as client,
    ):
        tokens = (await client.tokenize(WORDS, add_special_tokens=False)).tokens
        source = prompts(tokens, options.prompt_tokens, random.Random(options.seed))
        if options.warmup:
            await _warm_up(client, replace(load, num_requests=options.warmup), source, run_load)
        return await measure(client, load, source, options)


async def _warm_up(client: AsyncClient, load: Load, source: Any, run: Callable[..., Any]) -> None:
    """Requests that are not counted: the first ones of a server pay for its caches."""
    await run(client, replace(load, rate=None, num_clients=1), source)


def _progress(total: int) -> Callable[[int], object]:
    """A line on a terminal that counts; nothing elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        return lambda count: None
    end = {total: "\r\033[K"}
    return lambda count: print(
        f"\r{count} of {total}", end=end.get(count, ""), file=sys.stderr, flush=True
    )
