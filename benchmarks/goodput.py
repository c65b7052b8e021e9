"""The proof: who meets the budgets of a real arrival trace, at what depth, on a real server.

Replays a trace (JSON lines with t, prompt_tokens, output_tokens) open-loop at several rates. Each
request has a latency budget from one of three classes: 1.5, 3 or 8 times what it takes alone at
full depth, which is measured first. Compared, each on a fresh server:

    full, shallow, middle   every request at one exit, lock-step batches, no admission
    lockstep                our admission, lock-step batches
    deadline                our admission and our policy

All are graded alike, as the client saw it: due time to last chunk. `goodput_share` is the share of
all requests that were met, refused ones counted as not met. `met_of_admitted` leaves those out.
The quality of what was served is the mean `score` over tokens, where the checkpoint has scores.
With `--simulate` the steps of this machine are timed first, and stretched to what requests take
alone over HTTP. The simulator then runs the same requests through the same scheduling with those
times, and its goodput is printed beside the real one. The last line is one JSON document.

    python -m benchmarks.goodput trace.jsonl --rates 1 1.5 2 3 --num-requests 300 --plot goodput.svg
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.budget_classes import CLASSES, BudgetClass, Unloaded, draw_class, scaled
from benchmarks.lib.common import environment, percentile, print_json, print_table
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.loadgen import Planned, RequestRecord, Run, run_closed_loop, run_open_loop
from benchmarks.lib.server_process import ServerStartError, serve
from benchmarks.lib.workload import PromptMaker, RequestMaker, RequestSpec, load_trace
from benchmarks.serving import detect_model
from benchmarks.simulate import arrivals_of, stretched
from benchmarks.simulate import figures as simulated_figures
from sortserve.cost.machine import Machine
from sortserve.process.plot import Series, line_chart
from sortserve.process.profiling import measured_machine
from sortserve.simulation import simulate

__all__ = ["SYSTEMS", "figures", "main"]

SYSTEMS = ("full", "shallow", "middle", "lockstep", "deadline")
COLUMNS = (
    *("goodput_share", "goodput_per_s", "met_of_admitted", "refused_share"),
    *("mean_depth_share", "mean_score", "output_tokens_per_s"),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.goodput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, help="JSON lines: t, prompt_tokens, output_tokens")
    parser.add_argument("--model", help="default: the server's default")
    parser.add_argument("--exits", help="that the server opens; default: the checkpoint's own")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--lengths", type=float, default=0.25, help="scale of the trace's lengths")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--on-miss", choices=("reject", "degrade"), default="reject")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--simulate", action="store_true", help="the same in the simulator, too")
    parser.add_argument("--plot", type=Path, help="draw goodput over rate as an SVG")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="", help="more flags, separated by spaces")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Exits:
    """What ``GET /exits`` says."""

    layers: Sequence[int]
    scores: Mapping[int, float | None]

    @property
    def fixed(self) -> dict[str, int]:
        """The exit of each system that has only one."""
        layers = self.layers
        return {"full": layers[-1], "shallow": layers[0], "middle": layers[len(layers) // 2]}


async def read_exits(client: HttpClient) -> Exits:
    """Ask the server."""
    entries = (await client.request("GET", "/exits")).json()["exits"]
    return Exits([e["exit_layer"] for e in entries], {e["exit_layer"]: e["score"] for e in entries})


async def measure_unloaded(client: HttpClient, maker: RequestMaker, full: int) -> Unloaded:
    """A line through the first-token times of two prompt lengths, and the time of a token."""
    firsts: dict[int, float] = {}
    gaps: list[float] = []
    for num_prompt in (64, 512):
        spec = RequestSpec(num_prompt_tokens=num_prompt, num_output_tokens=32)

        def plan(spec: RequestSpec = spec) -> Iterator[Planned]:
            while True:
                yield Planned(maker.make(spec, full))

        run = await run_closed_loop(client, [plan()], num_requests=6)
        records = [record for record in run.records[1:] if record.ok]
        firsts[num_prompt] = percentile([r.ttft_s for r in records if r.ttft_s is not None], 0.5)
        gaps += [r.tpot_s for r in records if r.tpot_s is not None]
    slope = max(0.0, (firsts[512] - firsts[64]) / (512 - 64))
    start = max(0.0, firsts[64] - 64 * slope)
    return Unloaded(lambda num_tokens: start + slope * num_tokens, percentile(gaps, 0.5))


def plan_requests(
    specs: Sequence[RequestSpec],
    maker: RequestMaker,
    unloaded: Unloaded,
    exit_layer: int | None,
    arguments: argparse.Namespace,
) -> tuple[list[Planned], list[BudgetClass]]:
    """The requests as one system gets them, and the class each is graded by."""
    rng = random.Random(arguments.seed)
    planned, classes = [], []
    for spec in specs:
        budget_class = draw_class(rng)
        budget = budget_class.budget(unloaded, spec, arguments.on_miss)
        own = RequestMaker(
            model=maker.model, prompts=maker.prompts, budget={} if exit_layer else budget
        )
        planned.append(Planned(own.make(spec, exit_layer), exit_layer, spec.due_s))
        classes.append(budget_class)
    return planned, classes


def figures(
    run: Run,
    specs: Sequence[RequestSpec],
    classes: Sequence[BudgetClass],
    unloaded: Unloaded,
    exits: Exits,
) -> dict[str, Any]:
    """What a run comes to."""
    records = sorted(run.records, key=lambda record: record.due_s)
    met = [
        record.ok
        and record.e2e_s is not None
        and record.e2e_s * 1e3 <= budget_class.latency_ms(unloaded, spec)
        for record, spec, budget_class in zip(records, specs, classes, strict=True)
    ]
    refused = [record.status == 429 for record in records]
    by_class = {
        c.name: _share(
            sum(m for m, own in zip(met, classes, strict=True) if own is c),
            sum(own is c for own in classes),
        )
        for c in CLASSES
    }
    num_output = sum(record.num_output_tokens for record in records)
    tokens = [token for record in records for token in _tokens_by_exit(record)]
    num_tokens = sum(n for _, n in tokens)
    return {
        "goodput_share": _share(sum(met), len(met)),
        "goodput_per_s": round(sum(met) / run.wall_s, 3),
        "met_of_admitted": _share(sum(met), len(met) - sum(refused)),
        "refused_share": _share(sum(refused), len(refused)),
        "by_class": by_class,
        "mean_depth_share": _share(sum(e * n for e, n in tokens), num_tokens * exits.layers[-1]),
        "mean_score": _mean_score(tokens, exits),
        "output_tokens_per_s": round(num_output / run.wall_s, 1),
        "refusal_ms_p50": _refusal_ms(records, 0.5),
        "refusal_ms_p99": _refusal_ms(records, 0.99),
        "num_failed": sum(r.error is not None and r.status != 429 for r in records),
        "prediction_error_p50": _prediction_error(records),
        "wall_s": round(run.wall_s, 1),
        "max_send_lag_ms": round(max(r.sent_s - r.due_s for r in records) * 1e3, 1),
    }


def _mean_score(tokens: Sequence[tuple[int, int]], exits: Exits) -> float | None:
    """Over tokens; None where an exit in use has no score."""
    scored = [(exits.scores.get(e), n) for e, n in tokens]
    if any(score is None for score, _ in scored):
        return None
    return _share(sum((score or 0.0) * n for score, n in scored), sum(n for _, n in scored))


def _tokens_by_exit(record: RequestRecord) -> list[tuple[int, int]]:
    budget = record.budget or {}
    return [(int(e), n) for e, n in budget.get("tokens_by_exit", {}).items()]


def _prediction_error(records: Sequence[RequestRecord]) -> float | None:
    """Median of how far the server's predicted time was from its actual one."""
    pairs = [(r.budget or {}) for r in records if r.ok]
    errors = [
        abs(p["predicted_ms"] / p["actual_ms"] - 1.0)
        for p in pairs
        if p.get("predicted_ms") and p.get("actual_ms")
    ]
    return round(percentile(errors, 0.5), 4) if errors else None


def _refusal_ms(records: Sequence[RequestRecord], share: float) -> float | None:
    """From sending to the whole 429, as the client saw it."""
    times = [
        1e3 * (r.answered_s - r.sent_s)
        for r in records
        if r.status == 429 and r.answered_s is not None
    ]
    return round(percentile(times, share), 1) if times else None


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


async def measure_system(
    arguments: argparse.Namespace, system: str, unloaded: Unloaded | None
) -> tuple[dict[float, dict[str, Any]], Unloaded]:
    """One system at every rate, on a server of its own."""
    model = [arguments.model] if arguments.model else []
    opened = ["--exits", arguments.exits] if arguments.exits else []
    flags = ["--policy", _policy(system), *opened, *arguments.server_args.split()]
    results = {}
    async with serve([*model, *flags]) as client:
        prompts = PromptMaker(random.Random(arguments.seed), vocab_size=arguments.vocab_size)
        maker = RequestMaker(model=await detect_model(client), prompts=prompts)
        exits = await read_exits(client)
        if unloaded is None:
            unloaded = await measure_unloaded(client, maker, exits.layers[-1])
        for rate in arguments.rates:
            print(f"{system} at {rate:g} a second ...", flush=True)
            specs = specs_at(arguments, rate)
            exit_layer = exits.fixed.get(system)
            planned, classes = plan_requests(specs, maker, unloaded, exit_layer, arguments)
            run = await run_open_loop(client, planned)
            results[rate] = figures(run, specs, classes, unloaded, exits)
    return results, unloaded


async def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """All systems, one after the other."""
    machine = measured_machine(arguments.model, arguments.exits) if arguments.simulate else None
    unloaded: Unloaded | None = None
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for system in arguments.systems:
        found[system], unloaded = await measure_system(arguments, system, unloaded)
    assert unloaded is not None
    alone = {n: round(1e3 * unloaded.prefill_s(n), 2) for n in (64, 512)}
    results: dict[str, Any] = {
        "unloaded": {"ttft_ms": alone, "token_ms": round(1e3 * unloaded.token_s, 3)},
        "systems": found,
    }
    if machine is not None:
        results["simulated"] = simulate_all(arguments, machine, unloaded)
    return results


def specs_at(arguments: argparse.Namespace, rate: float) -> list[RequestSpec]:
    """The trace as it is replayed at a rate."""
    return scaled(
        load_trace(arguments.trace, num_requests=arguments.num_requests),
        lengths=arguments.lengths,
        rate=rate,
        max_prompt_tokens=arguments.max_prompt_tokens,
    )


def simulate_all(
    arguments: argparse.Namespace, machine: Machine, unloaded: Unloaded
) -> dict[str, dict[float, dict[str, Any]]]:
    """The same requests with the same budgets, for every system and rate, on the machine."""
    own = argparse.Namespace(**vars(arguments), unbudgeted=0.0)
    machine = stretched(machine, unloaded, specs_at(arguments, 1.0))

    def run(system: str, rate: float) -> dict[str, Any]:
        arrivals = arrivals_of(specs_at(arguments, rate), machine, system, own, unloaded)
        done = simulate(machine, arrivals, policy=_policy(system), seed=arguments.seed)
        return simulated_figures(done, machine, unloaded)

    return {s: {rate: run(s, rate) for rate in arguments.rates} for s in arguments.systems}


def _policy(system: str) -> str:
    return "deadline" if system == "deadline" else "lockstep"


def draw(found: Mapping[str, Mapping[float, Mapping[str, Any]]]) -> bytes:
    """Goodput over rate as an SVG, a line a system."""
    series = [
        Series(system, [(rate, f["goodput_share"] or 0.0) for rate, f in rates.items()], colour=i)
        for i, (system, rates) in enumerate(found.items())
    ]
    return line_chart("Requests that met their budget", "requests a second", "share", series)


def main(argv: list[str] | None = None) -> int:
    """Measures every system at every rate, prints and draws them."""
    arguments = parse_arguments(argv)
    described = environment()
    try:
        results = asyncio.run(measure_all(arguments))
    except (ServerStartError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for rate in arguments.rates:
        print(f"\nrate {rate:g} a second")
        rows = [
            [system, *(_cell(rates[rate][column]) for column in COLUMNS)]
            for system, rates in results["systems"].items()
        ]
        print_table(["system", *COLUMNS], rows)
        for system, rates in results["systems"].items():
            shares = ", ".join(f"{c} {_cell(v)}" for c, v in rates[rate]["by_class"].items())
            print(f"{system}: met by class: {shares}")
        for system, simulated in results.get("simulated", {}).items():
            real = results["systems"][system][rate]["goodput_share"]
            predicted = simulated[rate]["goodput_share"]
            print(f"{system}: goodput {_cell(real)}, simulated {_cell(predicted)}")
    if arguments.plot is not None:
        arguments.plot.write_bytes(draw(results["systems"]))
        print(f"plot: {arguments.plot}")
    print_json("goodput", arguments, described, results)
    return 0


def _cell(value: object) -> str | None:
    return f"{value:.3f}" if isinstance(value, float) else None if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
