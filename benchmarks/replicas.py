"""Routers over simulated replicas: quality-weighted goodput of each, from a trace of arrivals.

Every replica is the server's own scheduler, admission and cost model under a fake clock (see
``benchmarks/lib/fleet.py``), and refuses what it cannot keep. Only who gets which request differs:

    ours            ``sortserve.replicas.choice``, from reports that come every --report-every
    power-of-two    Ray Serve's default: of two replicas at random the one with fewer requests
    shortest-queue  of all replicas the one with fewest requests
    round-robin     each in turn

What a replica refuses is tried once more at another, chosen by the same router (--retries). Three
fleets are compared:

    equal      all replicas alike
    unequal    every second one is half as fast
    sessions   alike, and most prompts begin like an earlier one of the same session

``--loads`` are multiples of the rate at which full depth on one machine meets half of the budgets,
for each replica. Budgets are of three classes, as in ``benchmarks.simulate``. Every figure is the
mean over the seeds. The last line is one JSON document.

    python -m benchmarks.replicas trace.jsonl --fleets equal unequal --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.lib.budget_classes import CLASSES, plan_budgets
from benchmarks.lib.common import environment, json_line, print_table
from benchmarks.lib.fleet import Fleet, Replica, Served, in_sessions
from benchmarks.lib.grading import Graded, grade
from benchmarks.lib.journal import Journal
from benchmarks.lib.machines import MACHINES
from benchmarks.lib.routers import ROUTERS
from benchmarks.lib.workload import RequestSpec, load_trace
from benchmarks.simulate import arrivals_of, find_half_rate, scaled_to, slower, unloaded_times
from sortserve.core.request import Request
from sortserve.simulation import Arrival

__all__ = ["BASELINE", "FLEETS", "Run", "main", "run_fleet"]

BASELINE = "power-of-two"
FLEETS = {"equal": (1.0,), "unequal": (1.0, 0.5), "sessions": (1.0,)}
"""Speeds of the replicas, over and over."""
LOADS = (1.0, 1.3, 1.7)
UNJOURNALED = ("fleets", "routers", "loads", "retries", "seeds", "jobs", "journal", "json", "trace")
"""Arguments that say which runs are made, and nothing about any."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fleet under one load, behind one router."""

    fleet: str
    load: float
    router: str
    retries: int
    seed: int

    @property
    def name(self) -> str:
        """In the journal."""
        return f"{self.fleet}, load {self.load:g}, {self.router}, {self.retries}, {self.seed}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, help="JSON lines: t, prompt_tokens, output_tokens")
    parser.add_argument("--machine", choices=sorted(MACHINES), default="soft-13b")
    parser.add_argument("--num-replicas", type=int, default=8)
    parser.add_argument("--fleets", nargs="+", choices=list(FLEETS), default=["equal", "unequal"])
    parser.add_argument("--routers", nargs="+", choices=list(ROUTERS), default=list(ROUTERS))
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS))
    parser.add_argument("--half-rate", type=float, help="at which full meets half; default: found")
    parser.add_argument("--retries", type=int, nargs="+", default=[1])
    parser.add_argument("--report-every", type=float, default=0.1, help="seconds")
    parser.add_argument("--num-requests", type=int, default=1600)
    parser.add_argument("--lengths", type=float, default=0.25, help="scale of the trace's lengths")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--on-miss", choices=("reject", "degrade"), default="reject")
    parser.add_argument("--min-quality", type=float, default=0.5, help="floor of every budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--journal", type=Path, help="keep finished runs here, and go on from there"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--json", type=Path, help="write the last line here as well")
    return parser.parse_args(argv)


def run_fleet(run: Run, rate: float, trace: Sequence[RequestSpec], arguments: Any) -> Any:
    """The figures of one run.

    Args:
        run: what is to run.
        rate: requests a second, of the whole fleet.
        trace: as it was recorded.
        arguments: of the command line.
    """
    machine, speeds = MACHINES[arguments.machine], FLEETS[run.fleet]
    specs = scaled_to(trace, rate, arguments)
    planned = plan_budgets(
        specs,
        unloaded_times(machine),
        pinned=None,
        seed=run.seed,
        on_miss=arguments.on_miss,
        min_quality=None if machine.score is None else arguments.min_quality,
    )
    arrivals = arrivals_of(specs, planned)
    requests = [arrival.request(str(i)) for i, arrival in enumerate(arrivals)]
    if run.fleet == "sessions":
        requests = in_sessions(requests, seed=run.seed)
    replicas = [
        Replica(
            slower(machine, 1.0 / speeds[i % len(speeds)]),
            report_every_s=arguments.report_every,
            prefixes=run.fleet == "sessions",
            seed=f"{run.seed}/{i}",
        )
        for i in range(arguments.num_replicas)
    ]
    router = ROUTERS[run.router](len(replicas), run.seed)
    served = Fleet(replicas, router, retries=run.retries).run(requests)
    found = grade(
        [_graded(a, r, s) for a, r, s in zip(arrivals, requests, served, strict=True)],
        machine.table.scores,
        [c.name for c in CLASSES],
    )
    return found | {"retried_share": round(statistics.fmean(s.num_tries - 1 for s in served), 4)}


def _graded(arrival: Arrival, request: Request, served: Served) -> Graded:
    report = served.report if served.error is None else None
    limit_ms = request.budget.latency_ms
    assert limit_ms is not None
    return Graded(
        class_name=arrival.label,
        met=report is not None and report.e2e_s * 1e3 <= limit_ms,
        refused=served.error is not None,
        tokens_by_exit={} if report is None else report.tokens_by_exit,
    )


def summary(results: dict[Run, Any], run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """One system under one load: the means over the seeds, and beside the baseline."""
    own = [results[replace(run, seed=seed)] for seed in seeds]
    base = [results.get(replace(run, seed=seed, router=BASELINE)) for seed in seeds]
    quality = statistics.fmean(f["quality_goodput"] for f in own)
    ratios = [
        f["quality_goodput"] / b["quality_goodput"] for f, b in zip(own, base, strict=True) if b
    ]
    mean = {
        name: round(statistics.fmean(f[name] or 0.0 for f in own), 4)
        for name in ("goodput_share", "met_of_admitted", "refused_share", "mean_score")
    }
    return {
        "quality_goodput": round(quality, 4),
        "over_baseline": round(statistics.fmean(ratios), 3) if ratios else None,
        "over_baseline_by_seed": [round(ratio, 3) for ratio in ratios],
        **mean,
        "retried_share": round(statistics.fmean(f["retried_share"] for f in own), 4),
        "quality_by_class": {
            c.name: round(statistics.fmean(f["quality_by_class"][c.name] or 0.0 for f in own), 4)
            for c in CLASSES
        },
    }


COLUMNS = (
    *("quality_goodput", "over_baseline", "goodput_share", "met_of_admitted", "refused_share"),
    *("mean_score", "retried_share"),
)


def show(shown: dict[str, Any]) -> None:
    """A table for each fleet and load."""
    for title, systems in shown.items():
        print(f"\n{title}")
        rows = (
            [name, *(_cell(found[column]) for column in COLUMNS), _classes(found)]
            for name, found in systems.items()
        )
        print_table(["router", *COLUMNS, "by class"], rows)


def _cell(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _classes(found: dict[str, Any]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in found["quality_by_class"].items())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every router on every fleet under every load, and prints the means."""
    arguments, described = parse_arguments(argv), environment()
    machine = MACHINES[arguments.machine]
    try:
        trace = load_trace(arguments.trace, num_requests=arguments.num_requests)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.num_replicas} of {machine.name}: {machine.source}")
    half_rate = arguments.half_rate
    if half_rate is None:
        arguments.seed = 0
        half_rate = find_half_rate(machine, trace, unloaded_times(machine), arguments)
    print(f"full depth on one meets half of the budgets at {half_rate:.3g} requests a second")
    arguments.half_rate = half_rate
    try:
        known = {n: v for n, v in vars(arguments).items() if n not in UNJOURNALED}
        journal = Journal(arguments.journal, known)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    runs = [
        Run(fleet=fleet, load=load, router=router, retries=retries, seed=seed)
        for fleet, load, retries, seed, router in product(
            *(arguments.fleets, arguments.loads, arguments.retries),
            *(arguments.seeds, arguments.routers),
        )
    ]
    rates = [run.load * half_rate * capacity(run.fleet, arguments.num_replicas) for run in runs]
    results = run_all(dict(zip(runs, rates, strict=True)), trace, arguments, journal)
    shown: dict[str, Any] = {}
    for run in runs:
        retried = f"{run.retries} retries" if run.retries != 1 else "1 retry"
        title = f"{run.fleet}, load {run.load:g}, {retried}"
        shown.setdefault(title, {})[run.router] = summary(results, run, arguments.seeds)
    show(shown)
    line = json_line(
        "replicas",
        arguments,
        described,
        {"source": machine.source, "half_rate": half_rate, "systems": shown},
    )
    if arguments.json is not None:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


def run_all(
    rates: dict[Run, float], trace: Sequence[RequestSpec], arguments: Any, journal: Journal
) -> dict[Run, Any]:
    """The figures of all runs at their rates; those of the journal are not run again."""
    with ProcessPoolExecutor(arguments.jobs) as pool:
        asked = {
            pool.submit(run_fleet, run, rate, trace, arguments): run
            for run, rate in rates.items()
            if run.name not in journal
        }
        for future in as_completed(asked):
            run = asked[future]
            found = journal.add(run.name, future.result())
            print(f"{run.name}: {found['quality_goodput']}", flush=True)
    return {run: journal[run.name] for run in rates}


def capacity(fleet: str, num_replicas: int) -> float:
    """What the fleet is worth in replicas of full speed."""
    speeds = FLEETS[fleet]
    return sum(speeds[i % len(speeds)] for i in range(num_replicas))


if __name__ == "__main__":
    sys.exit(main())
