"""What scheduling costs: microseconds of a step that are not the model's, by number of rows.

The engine runs with a model that takes no time, so what is left is everything else: entering the
batch, due times, the cap, page tables, plans, commits, refits and the state for the event loop. The
times are CPU times of the engine's thread, so that a busy machine does not count. The share is of
the step's predicted time on the machine that `--machine` names (see
`benchmarks/lib/machines.py`). `choose_us` is what judging one newcomer costs the event loop. The
last line is one JSON document.

    python -m benchmarks.scheduler --rows 8 64 256
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

from benchmarks.lib.common import environment, percentile, print_json, print_table
from benchmarks.lib.machines import MACHINES
from sortserve.admission.desk import AdmissionDesk
from sortserve.core.budget import Budget
from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import SampledToken
from sortserve.cost.machine import Machine
from sortserve.cost.model import step_shape
from sortserve.engine.desk import desk_of
from sortserve.engine.engine import Engine, EngineConfig
from sortserve.scheduling.policies.table import POLICIES
from sortserve.simulation import MAX_MODEL_LEN, Arrival, BlankRunner, make_engine

__all__ = ["main", "measure"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--policies", nargs="+", choices=sorted(POLICIES), default=["deadline"])
    parser.add_argument("--machine", choices=sorted(MACHINES), default="cpu2")
    parser.add_argument("--steps", type=int, default=200, help="measured, after a quarter as many")
    parser.add_argument("--context", type=int, default=256)
    return parser.parse_args(argv)


class _Costless(BlankRunner):
    """Takes no time, and adds up what its plans would have taken."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.exits, num_pages=200_000)
        self.own_s = 0.0
        self.model_s: list[float] = []
        self._model = machine.model

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        started_s = time.thread_time()
        self.model_s.append(self._model.step_s(step_shape(plan)))
        tokens = super().execute(plan)
        self.own_s += time.thread_time() - started_s
        return tokens


class _Clock:
    """The sum of the model's times: what the policy sees must be plausible."""

    def __init__(self, runner: _Costless) -> None:
        self._runner = runner
        self._total_s = 0.0
        self._num_added = 0

    def __call__(self) -> float:
        new = self._runner.model_s[self._num_added :]
        self._total_s += sum(new)
        self._num_added += len(new)
        return self._total_s


def measure(
    machine: Machine, policy: str, num_rows: int, *, num_steps: int, context: int
) -> dict[str, Any]:
    """Figures of one policy at one number of rows, half of them with a budget."""
    runner = _Costless(machine)
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_rows,
        policy=policy,
        enable_prefix_caching=False,
        seed=0,
    )
    engine = make_engine(machine, runner, _Clock(runner), config)
    desk = desk_of(engine)
    choose_s = _fill(engine, desk, num_rows, num_steps=num_steps, context=context)
    while any(s.num_pending_tokens > 1 for s in engine.scheduler.sequences()):
        engine.step()
    for _ in range(num_steps // 4):
        engine.step()
    seconds, before = [], len(runner.model_s)
    for _ in range(num_steps):
        own_s, started_s = runner.own_s, time.thread_time()
        engine.step()
        engine.stats()
        desk.see(engine.demands())
        seconds.append(time.thread_time() - started_s - (runner.own_s - own_s))
    model_s = runner.model_s[before:]
    return {
        "policy": policy,
        "rows": num_rows,
        "mean_us": 1e6 * sum(seconds) / len(seconds),
        "p99_us": 1e6 * percentile(seconds, 0.99),
        "model_step_ms": 1e3 * sum(model_s) / len(model_s),
        "share_percent": 100 * sum(seconds) / sum(model_s),
        "choose_us": 1e6 * percentile(choose_s, 0.5),
    }


def _fill(
    engine: Engine, desk: AdmissionDesk, num_rows: int, *, num_steps: int, context: int
) -> list[float]:
    """Let the rows in, half with a loose budget; returns what each decision took."""
    rng, exits, seconds = random.Random(0), engine.exits.layers, []
    for i in range(num_rows):
        budgeted = Budget(latency_ms=1e7, on_miss="degrade")  # type: ignore[arg-type]
        budget = budgeted if i % 2 else Budget(exit_layer=rng.choice(exits))
        arrival = Arrival(
            due_s=engine.clock(),
            num_prompt_tokens=context,
            num_output_tokens=4 * num_steps,
            budget=budget,
        )
        request = arrival.request(str(i))
        started_s = time.thread_time()
        choice = desk.choose(request, engine.validate(request))
        seconds.append(time.thread_time() - started_s)
        engine.add_request(request, choice)
        desk.see(engine.demands())
    return seconds[num_rows // 2 :]


def main(argv: list[str] | None = None) -> int:
    """Measures every policy at every number of rows."""
    arguments = parse_arguments(argv)
    described, machine = environment(), MACHINES[arguments.machine]
    results = [
        measure(machine, policy, rows, num_steps=arguments.steps, context=arguments.context)
        for policy in arguments.policies
        for rows in arguments.rows
    ]
    print(f"{machine.name}: {machine.source}")
    columns = list(results[0])
    print_table(columns, ([r[column] for column in columns] for r in results))
    print_json("scheduler", arguments, described, {"figures": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
