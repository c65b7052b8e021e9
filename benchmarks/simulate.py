"""Goodput of every policy on a simulated machine, from a trace of arrivals.

The server's own scheduler, admission and cost model run under a fake clock; only the model is
replaced by the time it would take (see ``sortserve/simulation.py``). Each request gets a
latency budget from one of three classes. Compared are, at several arrival rates:

    full, shallow, middle   every request at one exit, lock-step, no admission
    lockstep                our admission, lock-step batches
    deadline                our admission and policy

Machines named ``h100`` and ``a100`` are computed from public data-sheet rates, not measured. The
last line is one JSON document.

    python -m benchmarks.simulate trace.jsonl --machine cpu2 --rates 1 2 3 --num-requests 1000
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lib.budget_classes import CLASSES, Unloaded, draw_class, scaled
from benchmarks.lib.common import environment, percentile, print_json, print_table
from benchmarks.lib.machines import MACHINES
from benchmarks.lib.workload import RequestSpec, load_trace
from sortserve.core.budget import Budget
from sortserve.cost.machine import Machine
from sortserve.simulation import Arrival, Outcome, Simulated, simulate

__all__ = ["SYSTEMS", "arrivals_of", "figures", "main", "stretched", "unloaded_times"]

SYSTEMS = ("full", "shallow", "middle", "lockstep", "deadline")
COLUMNS = (
    *("goodput_share", "met_of_admitted", "refused_share", "mean_depth_share"),
    *("mean_score", "output_tokens_per_s", "num_lowered"),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, help="JSON lines: t, prompt_tokens, output_tokens")
    parser.add_argument("--machine", choices=sorted(MACHINES), default="cpu2")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--lengths", type=float, default=0.25, help="scale of the trace's lengths")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--unbudgeted", type=float, default=0.0, help="share without a budget")
    parser.add_argument("--on-miss", choices=("reject", "degrade"), default="reject")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def unloaded_times(machine: Machine) -> Unloaded:
    """What the machine takes for one request at full depth."""
    model, full = machine.model, machine.exits[-1]
    c0, a, b, d, h = model.small
    return Unloaded(
        lambda num_tokens: model.prefill_s(full, num_tokens),
        c0 + (a + b + 256 * d) * full + h,
    )


def stretched(machine: Machine, unloaded: Unloaded, specs: Sequence[RequestSpec]) -> Machine:
    """The machine as its clients meet it, HTTP and their own work on the same cores included.

    All its times are multiplied by one factor, with which the requests, each alone at full depth,
    take what ``unloaded`` says in sum.
    """
    own = unloaded_times(machine)
    factor = sum(map(unloaded.e2e_s, specs)) / sum(map(own.e2e_s, specs))
    small, large = (
        (factor * c0, factor * a, factor * b, factor * d, factor * h)
        for c0, a, b, d, h in (machine.small, machine.large)
    )
    return replace(machine, small=small, large=large)


def arrivals_of(
    specs: Sequence[RequestSpec],
    machine: Machine,
    system: str,
    arguments: argparse.Namespace,
    unloaded: Unloaded | None = None,
) -> list[Arrival]:
    """The requests as one system gets them: with budgets, or pinned to an exit.

    Args:
        specs: scaled, in order.
        machine: whose exits they are pinned to.
        system: one of ``SYSTEMS``.
        arguments: its ``seed``, ``on_miss`` and ``unbudgeted``.
        unloaded: what budgets are multiples of; None is what the machine says.
    """
    rng, unloaded = random.Random(arguments.seed), unloaded or unloaded_times(machine)
    fixed = {"full": -1, "shallow": 0, "middle": len(machine.exits) // 2}
    arrivals = []
    for spec in specs:
        budget_class = draw_class(rng)
        is_budgeted = not arguments.unbudgeted or rng.random() >= arguments.unbudgeted
        if system in fixed:
            budget = Budget(exit_layer=machine.exits[fixed[system]])
        elif is_budgeted:
            values = budget_class.budget(unloaded, spec, arguments.on_miss)
            budget = Budget.from_mapping(values)
        else:
            budget = Budget()
        arrivals.append(
            Arrival(
                due_s=spec.due_s,
                num_prompt_tokens=spec.num_prompt_tokens,
                num_output_tokens=spec.num_output_tokens,
                budget=budget,
                label=budget_class.name if is_budgeted else "unbudgeted",
            )
        )
    return arrivals


def figures(run: Simulated, machine: Machine, unloaded: Unloaded | None = None) -> dict[str, Any]:
    """What a run comes to: goodput, attainment, depth, quality, refusals."""
    unloaded = unloaded or unloaded_times(machine)
    factors = {c.name: c for c in CLASSES}
    graded = [o for o in run.outcomes if o.arrival.label in factors]
    met = [o for o in graded if _is_met(o, factors[o.arrival.label].latency_ms(unloaded, _spec(o)))]
    admitted = [o for o in graded if o.error is None]
    served = [o for o in run.outcomes if o.error is None and o.report is not None]
    tokens = [
        (e, n) for o in served if o.report is not None for e, n in o.report.tokens_by_exit.items()
    ]
    num_tokens = sum(n for _, n in tokens)
    scores = machine.score or {e: machine.compute[e] for e in machine.exits}
    by_class = {
        name: _share(
            sum(o in met for o in graded if o.arrival.label == name),
            sum(o.arrival.label == name for o in graded),
        )
        for name in factors
    }
    return {
        "goodput_share": _share(len(met), len(graded)),
        "goodput_per_s": round(len(met) / run.wall_s, 3),
        "met_of_admitted": _share(len(met), len(admitted)),
        "refused_share": _share(sum(o.error is not None for o in graded), len(graded)),
        "by_class": by_class,
        "mean_depth_share": _share(sum(e * n for e, n in tokens), num_tokens * machine.exits[-1]),
        "mean_score": _share(sum(scores[e] * n for e, n in tokens), num_tokens),
        "output_tokens_per_s": round(num_tokens / run.wall_s, 1),
        "num_lowered": run.num_lowered,
        "num_preemptions": run.num_preemptions,
        "num_steps": run.num_steps,
        "wall_s": round(run.wall_s, 1),
        "step_error_p50": _error(run.step_errors, 0.5),
        "step_error_p95": _error(run.step_errors, 0.95),
    }


def _spec(outcome: Outcome) -> RequestSpec:
    arrival = outcome.arrival
    return RequestSpec(
        num_prompt_tokens=arrival.num_prompt_tokens, num_output_tokens=arrival.num_output_tokens
    )


def _is_met(outcome: Outcome, limit_ms: float) -> bool:
    report = outcome.report
    return outcome.error is None and report is not None and report.e2e_s * 1e3 <= limit_ms


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _error(ratios: Sequence[float], share: float) -> float | None:
    errors = [abs(ratio - 1.0) for ratio in ratios]
    return round(percentile(errors, share), 4) if errors else None


def main(argv: list[str] | None = None) -> int:
    """Simulates every system at every rate and prints them."""
    arguments = parse_arguments(argv)
    described = environment()
    machine = MACHINES[arguments.machine]
    try:
        trace = load_trace(arguments.trace, num_requests=arguments.num_requests)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{machine.name}: {machine.source}")
    results: dict[str, Any] = {"source": machine.source, "rates": {}}
    for rate in arguments.rates:
        specs = scaled(
            trace,
            lengths=arguments.lengths,
            rate=rate,
            max_prompt_tokens=arguments.max_prompt_tokens,
        )
        started_s = time.perf_counter()
        found = {
            system: figures(
                simulate(
                    machine,
                    arrivals_of(specs, machine, system, arguments),
                    policy="deadline" if system == "deadline" else "lockstep",
                    max_num_seqs=arguments.max_num_seqs,
                    seed=arguments.seed,
                ),
                machine,
            )
            for system in arguments.systems
        }
        results["rates"][rate] = found
        print(f"\nrate {rate:g} a second ({time.perf_counter() - started_s:.1f} s)")
        rows = ([name, *(_cell(f[column]) for column in COLUMNS)] for name, f in found.items())
        print_table(["system", *COLUMNS], rows)
        for name, f in found.items():
            shares = ", ".join(f"{c} {_cell(v)}" for c, v in f["by_class"].items())
            print(f"{name}: met by class: {shares}")
    print_json("simulate", arguments, described, results)
    return 0


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
