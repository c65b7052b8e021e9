"""Goodput of every system on a simulated machine, from a trace of arrivals.

The server's own scheduler, admission and cost model run under a fake clock; only the model is
replaced by the time it would take (see ``sortserve/simulation.py``). Each request gets a
latency budget from one of three classes. Compared are, at several arrival rates:

    full, shallow, middle         every request at one exit, lock-step batches, no admission
    lockstep                      our admission, lock-step batches
    quality, attainment, depth    our admission and policy, with that objective
    deadline                      the same with the server's default objective

What counts is quality-weighted goodput: the mean score of the tokens of each answer that was in
time, 0 of all others, over all arrivals. ``--loads`` are multiples of the rate at which ``full``
meets half of the budgets, which is searched for first; ``--rates`` are requests a second. Every
machine but ``cpu2`` is computed from public data-sheet rates, not measured. The last line is one
JSON document.

    python -m benchmarks.simulate trace.jsonl --machine soft-13b --num-requests 1000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.budget_classes import CLASSES, Budgeted, Unloaded, plan_budgets, scaled
from benchmarks.lib.common import environment, percentile, print_json, print_table
from benchmarks.lib.goodput_page import COLUMNS, cells, class_line
from benchmarks.lib.grading import Graded, grade
from benchmarks.lib.half_rate import HalfRateSearch
from benchmarks.lib.machines import MACHINES, machine_named
from benchmarks.lib.replay import Crowd
from benchmarks.lib.systems import DEFAULT_SYSTEMS, SYSTEMS, System
from benchmarks.lib.workload import RequestSpec, load_trace
from sortserve.core.budget import Budget
from sortserve.cost.machine import Machine
from sortserve.cost.model import Line, RowShape, StepShape
from sortserve.cost.step_curve import StepCurve
from sortserve.simulation import Arrival, Outcome, Simulated, simulate

__all__ = [
    "LOADS",
    "arrivals_of",
    "figures",
    "find_half_rate",
    "main",
    "over_http",
    "run_system",
    "slower",
]

LOADS = (0.5, 0.75, 1.0, 1.5, 2.0)
MAX_CHUNK = 1024
LEAST_FACTOR = 0.1
"""No prompt counts as more than ten times faster than it was timed."""
CONTEXT_LEN = 256
"""Of the token whose time stands for all."""
PROMPTS = (64, 512)
"""Lengths at which a machine and what its clients saw are compared."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, help="JSON lines: t, prompt_tokens, output_tokens")
    parser.add_argument(
        "--machine",
        default="cpu2",
        help=f"{', '.join(sorted(MACHINES))}, or a page of goodput --simulate: its machine",
    )
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rates", type=float, nargs="+", help="requests a second")
    rates.add_argument("--loads", type=float, nargs="+", default=list(LOADS))
    parser.add_argument("--half-rate", type=float, help="at which full meets half; default: found")
    parser.add_argument(
        "--systems", nargs="+", choices=list(SYSTEMS), default=list(DEFAULT_SYSTEMS)
    )
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--lengths", type=float, default=0.25, help="scale of the trace's lengths")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--unbudgeted", type=float, default=0.0, help="share without a budget")
    parser.add_argument("--on-miss", choices=("reject", "degrade"), default="reject")
    parser.add_argument("--min-quality", type=float, default=0.5, help="floor of every budget")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def unloaded_times(machine: Machine) -> Unloaded:
    """What the machine takes for one request at full depth."""
    return Unloaded(partial(_prompt_s, machine), _step_s(machine, 1, CONTEXT_LEN))


def _prompt_s(machine: Machine, num_tokens: int) -> float:
    """Seconds of a prompt alone, in chunks."""
    ends = [*range(MAX_CHUNK, num_tokens, MAX_CHUNK), num_tokens]
    starts = [0, *ends[:-1]]
    return sum(_step_s(machine, end - start, end) for start, end in zip(starts, ends, strict=True))


def _step_s(machine: Machine, num_tokens: int, context_len: int) -> float:
    row = RowShape(machine.exits[-1], num_tokens, context_len, samples=True)
    return machine.step_s(StepShape.of([row]))


def over_http(machine: Machine, unloaded: Unloaded, crowd: Crowd | None = None) -> Machine:
    """The machine as its clients meet it, HTTP and their own work on the same cores included.

    A prompt takes so many times as long for each token, for the machine's arithmetic may have
    become slower or faster since it was timed, and something more in each step. A token takes
    something more in each step, whatever that runs, and what a crowd takes beyond is so much for
    each row. (A factor on the times of small steps made large batches slower than they are.) Where
    a token took less than the machine said, all small steps take less.
    """
    own, (few, many) = unloaded_times(machine), PROMPTS
    curve = machine.curve or StepCurve.fit(machine.calibration())
    seen_s = unloaded.prefill_s(many) - unloaded.prefill_s(few)
    large = seen_s / (own.prefill_s(many) - own.prefill_s(few))
    curve = curve.slower(min(unloaded.token_s / own.token_s, 1.0), max(large, LEAST_FACTOR))
    own = unloaded_times(replace(machine, curve=curve))
    large_s = unloaded.prefill_s(few) - own.prefill_s(few)
    curve = curve.later(max(unloaded.token_s - own.token_s, 0.0), max(large_s, 0.0))
    if crowd is not None:
        row = RowShape(machine.exits[-1], 1, crowd.context_len, samples=True)
        more_s = crowd.token_s - curve.step_s(StepShape.of([row] * crowd.num_rows))
        row_s = max(more_s, 0.0) / (crowd.num_rows - 1)
        curve = replace(curve.later(-row_s, -row_s), sampled_s=curve.sampled_s + row_s)
    return replace(machine, curve=curve)


def slower(machine: Machine, small: float, large: float | None = None) -> Machine:
    """The machine with small and large steps taking so many times as long; None: as the small."""
    large = small if large is None else large
    return replace(
        machine,
        small=_times(small, machine.small),
        large=_times(large, machine.large),
        curve=None if machine.curve is None else machine.curve.slower(small, large),
    )


def _times(factor: float, line: Line) -> Line:
    c0, a, b, d, h = line
    return factor * c0, factor * a, factor * b, factor * d, factor * h


def arrivals_of(specs: Sequence[RequestSpec], planned: Sequence[Budgeted]) -> list[Arrival]:
    """A trace with its budgets, as the simulation takes it."""
    return [
        Arrival(
            due_s=spec.due_s,
            num_prompt_tokens=spec.num_prompt_tokens,
            num_output_tokens=spec.num_output_tokens,
            budget=Budget.from_mapping(own.budget),
            label=own.budget_class.name if own.budget_class else "unbudgeted",
        )
        for spec, own in zip(specs, planned, strict=True)
    ]


def run_system(
    machine: Machine,
    specs: Sequence[RequestSpec],
    system: System,
    unloaded: Unloaded,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of one system under one load.

    Args:
        machine: how long steps take, and what the exits are worth.
        specs: scaled, in order.
        system: who serves them.
        unloaded: what budgets are multiples of.
        arguments: ``seed``, ``on_miss``, ``min_quality`` and, if they are there, ``unbudgeted`` and
            ``max_num_seqs``.
    """
    planned = plan_budgets(
        specs,
        unloaded,
        pinned=system.pinned(machine.exits),
        seed=arguments.seed,
        on_miss=arguments.on_miss,
        min_quality=None if machine.score is None else arguments.min_quality,
        unbudgeted=getattr(arguments, "unbudgeted", 0.0),
    )
    done = simulate(
        machine,
        arrivals_of(specs, planned),
        max_num_seqs=getattr(arguments, "max_num_seqs", 256),
        seed=arguments.seed,
        **system.options,
    )
    return figures(done, machine, unloaded)


def figures(run: Simulated, machine: Machine, unloaded: Unloaded | None = None) -> dict[str, Any]:
    """What a run comes to: goodput, attainment, depth, quality, refusals."""
    unloaded = unloaded or unloaded_times(machine)
    requests = [_graded(outcome, unloaded) for outcome in run.outcomes]
    found = grade(requests, machine.table.scores, [c.name for c in CLASSES])
    num_tokens = sum(sum(r.tokens_by_exit.values()) for r in requests)
    return {
        **found,
        "goodput_per_s": round(sum(bool(r.met) for r in requests) / run.wall_s, 3),
        "output_tokens_per_s": round(num_tokens / run.wall_s, 1),
        "num_lowered": run.num_lowered,
        "num_preemptions": run.num_preemptions,
        "num_steps": run.num_steps,
        "wall_s": round(run.wall_s, 1),
        "step_error_p50": _error(run.step_errors, 0.5),
        "step_error_p95": _error(run.step_errors, 0.95),
    }


def _graded(outcome: Outcome, unloaded: Unloaded) -> Graded:
    arrival, report = outcome.arrival, outcome.report
    budget_class = {c.name: c for c in CLASSES}.get(arrival.label)
    is_served = outcome.error is None and report is not None
    met = None
    if budget_class is not None:
        spec = RequestSpec(
            num_prompt_tokens=arrival.num_prompt_tokens, num_output_tokens=arrival.num_output_tokens
        )
        limit_ms = budget_class.latency_ms(unloaded, spec)
        met = is_served and report is not None and report.e2e_s * 1e3 <= limit_ms
    return Graded(
        class_name=arrival.label,
        met=met,
        refused=outcome.error is not None,
        tokens_by_exit=report.tokens_by_exit if is_served and report is not None else {},
    )


def _error(ratios: Sequence[float], share: float) -> float | None:
    errors = [abs(ratio - 1.0) for ratio in ratios]
    return round(percentile(errors, share), 4) if errors else None


def find_half_rate(
    machine: Machine,
    trace: Sequence[RequestSpec],
    unloaded: Unloaded,
    arguments: argparse.Namespace,
) -> float:
    """The rate at which full depth meets half of the budgets, on a simulated machine."""
    mean_s = sum(map(unloaded.e2e_s, scaled_to(trace, 1.0, arguments))) / len(trace)
    search = HalfRateSearch(1.0 / mean_s)
    while not search.is_done:
        specs = scaled_to(trace, search.rate, arguments)
        found = run_system(machine, specs, SYSTEMS["full"], unloaded, arguments)
        search.tell(found["goodput_share"] or 0.0)
    return search.rate


def scaled_to(
    trace: Sequence[RequestSpec], rate: float, arguments: argparse.Namespace
) -> list[RequestSpec]:
    """A trace at a rate, with lengths as the command line wants them."""
    return scaled(
        trace,
        lengths=arguments.lengths,
        rate=rate,
        max_prompt_tokens=arguments.max_prompt_tokens,
    )


def main(argv: list[str] | None = None) -> int:
    """Simulates every system at every rate and prints them."""
    arguments = parse_arguments(argv)
    described = environment()
    try:
        machine = machine_named(arguments.machine)
        trace = load_trace(arguments.trace, num_requests=arguments.num_requests)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{machine.name}: {machine.source}")
    unloaded = unloaded_times(machine)
    half_rate = arguments.half_rate
    if half_rate is None and not arguments.rates:
        half_rate = find_half_rate(machine, trace, unloaded, arguments)
        print(f"full depth meets half of the budgets at {half_rate:.3g} requests a second")
    rates = arguments.rates or [round(load * half_rate, 4) for load in arguments.loads]
    results: dict[str, Any] = {"source": machine.source, "half_rate": half_rate, "rates": {}}
    for rate in rates:
        specs, started_s = scaled_to(trace, rate, arguments), time.perf_counter()
        found = {
            name: run_system(machine, specs, SYSTEMS[name], unloaded, arguments)
            for name in arguments.systems
        }
        results["rates"][rate] = found
        load = f", load {rate / half_rate:.3g}" if half_rate else ""
        print(f"\nrate {rate:g} a second{load} ({time.perf_counter() - started_s:.1f} s)")
        print_table(["system", *COLUMNS], ([name, *cells(f)] for name, f in found.items()))
        for name, f in found.items():
            print(class_line(name, f))
    print_json("simulate", arguments, described, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
