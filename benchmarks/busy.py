"""Decode steps beside other busy programs: by backend and number of threads.

    python -m benchmarks.busy --arms cpu:1 cpu:2 cpu:auto --loads none spin:1 memory:2 --rows 1 8

The model is random and shaped like SmolLM2-135M (``benchmarks.kernels``). In each situation the
arms take turns, ``TURN_STEPS`` steps at a time, so that what else the machine does hits all alike.
``auto`` is the server's own policy, which begins each number of rows with all threads and pays
for what it finds out. The mean counts: a step that waits for a core is rare and long, and a median
does not see it. The last column is the mean beside the best arm's. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.kernels import BLOCK_SIZE, DECODE_CONTEXT, make_batch
from benchmarks.lib.common import environment, percentile, print_json, print_table
from benchmarks.lib.floors import ModelCost, measure_machine
from benchmarks.lib.neighbours import KINDS, Neighbours
from benchmarks.lib.random_model import CONFIG, random_weights
from sortserve.core.errors import ConfigError
from sortserve.engine.cores import num_usable_cores
from sortserve.engine.thread_policy import ThreadPolicy
from sortserve.model.backends import choose_backend
from sortserve.model.decoder import Decoder
from sortserve.model.weights import ModelWeights

TURN_STEPS = 8
AUTO = "auto"
ARMS = ("cpu:1", "cpu:2", "cpu:auto")
LOADS = ("none", "spin:0.5", "spin:1", "spin:2", "memory:0.5", "memory:1", "memory:2")


def main() -> None:
    arguments = parse_arguments()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    described = environment()
    with torch.inference_mode():
        machine = measure_machine(torch.device("cpu"), dtype)
        weights = random_weights(dtype)
        decoders = make_decoders(weights, sorted({split(name)[0] for name in arguments.arms}))
        cost = ModelCost(CONFIG, weights)
        rows: list[dict[str, Any]] = []
        for num_rows in arguments.rows:
            work = cost.decode(CONFIG.num_layers, num_rows=num_rows, context_len=DECODE_CONTEXT)
            torch.set_num_threads(num_usable_cores())
            arms = make_arms(arguments.arms, decoders, num_rows)
            for load in arguments.loads:
                with neighbours(load):
                    times = take_turns(arms, arguments.seconds)
                rows += figures(f"{num_rows} rows, {load}", times, machine.floor_s(work))
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    print_json("busy", arguments, described, {"steps": rows})


def parse_arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode steps beside other busy programs.")
    parser.add_argument(
        "--arms", nargs="+", default=ARMS, help="BACKEND:THREADS of each, or BACKEND:auto"
    )
    parser.add_argument(
        "--loads", nargs="+", default=LOADS, help=f"none, or one of {KINDS}:BUSY_CORES"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each arm, in each situation")
    return parser.parse_args(args)


def split(name: str) -> tuple[str, str]:
    """``cpu:2``: the backend and its threads."""
    backend, _, threads = name.partition(":")
    return backend, threads


def neighbours(load: str) -> AbstractContextManager[object]:
    """``spin:1.5``: the processes of that name beside us; ``none``: nobody."""
    if load == "none":
        return nullcontext()
    kind, _, num_busy = load.partition(":")
    return Neighbours(kind, float(num_busy))


def make_decoders(weights: ModelWeights, backends: Sequence[str]) -> dict[str, Decoder]:
    decoders = {}
    for name in backends:
        try:
            backend = choose_backend(CONFIG, weights.dtype, torch.device("cpu"), name)
        except ConfigError as error:
            raise SystemExit(f"{error}") from error
        decoders[name] = Decoder(
            CONFIG, weights, exits=(9, 15, 21, 30), max_model_len=2048, backend=backend
        )
    return decoders


class Arm:
    """A decoder with a number of threads, or with as many as the policy finds best.

    Args:
        threads: a number, or ``auto``.
        step: runs one.
    """

    def __init__(self, threads: str, step: Callable[[], object]) -> None:
        self._step = step
        self._fixed = None if threads == AUTO else int(threads)
        self._policy = ThreadPolicy(torch.get_num_threads())
        self._own_s = 0.0
        """Time of this arm's steps: the others' turns are not there for the policy."""

    def turn(self, num_steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        times = []
        for _ in range(num_steps):
            torch.set_num_threads(self._fixed or self._policy.num_threads)
            started_s = time.perf_counter()
            self._step()
            seconds = time.perf_counter() - started_s
            self._own_s += seconds
            self._policy.observe(seconds, seconds, self._own_s)
            times.append(seconds)
        return times


def make_arms(
    names: Sequence[str], decoders: Mapping[str, Decoder], num_rows: int
) -> dict[str, Arm]:
    """The arms by name, with a batch of so many rows."""
    some = next(iter(decoders.values()))
    batch = make_batch(num_rows, 1, DECODE_CONTEXT, some.num_slabs)
    num_pages = num_rows * some.num_slabs * math.ceil(DECODE_CONTEXT / BLOCK_SIZE)
    cache = some.allocate_kv_cache(num_pages, BLOCK_SIZE)

    def step(decoder: Decoder) -> Callable[[], object]:
        return lambda: decoder.logits(decoder.forward(batch, cache))

    return {
        name: Arm(threads, step(decoders[backend]))
        for name, (backend, threads) in ((name, split(name)) for name in names)
    }


def take_turns(arms: Mapping[str, Arm], seconds: float) -> dict[str, list[float]]:
    """Seconds of each step, by arm, after a turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm.turn(TURN_STEPS)
    until_s = time.perf_counter() + seconds * len(arms)
    while time.perf_counter() < until_s:
        for name, arm in arms.items():
            times[name] += arm.turn(TURN_STEPS)
    return times


def figures(
    situation: str, times: Mapping[str, Sequence[float]], floor_s: float
) -> list[dict[str, Any]]:
    """One row for each arm; milliseconds."""
    best = min(statistics.fmean(values) for values in times.values())
    return [
        {
            "situation": situation,
            "arm": name,
            "mean": round(statistics.fmean(values) * 1e3, 2),
            "p50": round(statistics.median(values) * 1e3, 2),
            "p95": round(percentile(values, 0.95) * 1e3, 2),
            "floor": round(floor_s * 1e3, 2),
            "x best": f"{statistics.fmean(values) / best:.2f}",
        }
        for name, values in times.items()
    ]


if __name__ == "__main__":
    main()
