"""The simulator runs the server's own scheduling: its figures must make sense."""

from __future__ import annotations

import argparse
import random

import pytest
from benchmarks.lib.budget_classes import CLASSES, Unloaded, scaled
from benchmarks.lib.machines import MACHINES
from benchmarks.lib.workload import RequestSpec
from benchmarks.simulate import arrivals_of, figures, stretched, unloaded_times

from sortserve.simulation import simulate

CPU = MACHINES["cpu2"]


def trace(count: int, rate: float) -> list[RequestSpec]:
    rng = random.Random(0)
    specs = [
        RequestSpec(
            num_prompt_tokens=rng.randint(20, 400),
            num_output_tokens=rng.randint(5, 60),
            due_s=float(i),
        )
        for i in range(count)
    ]
    return scaled(specs, lengths=1.0, rate=rate, max_prompt_tokens=1024)


def run(system: str, rate: float, *, on_miss: str = "reject") -> dict[str, object]:
    arguments = argparse.Namespace(seed=0, unbudgeted=0.0, on_miss=on_miss)
    arrivals = arrivals_of(trace(60, rate), CPU, system, arguments)
    policy = "deadline" if system == "deadline" else "lockstep"
    return figures(simulate(CPU, arrivals, policy=policy), CPU)


def number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def test_a_trace_is_scaled_to_lengths_and_rate() -> None:
    specs = [
        RequestSpec(num_prompt_tokens=100, num_output_tokens=9, due_s=due_s)
        for due_s in (10.0, 20.0, 30.0)
    ]

    found = scaled(specs, lengths=0.5, rate=2.0, max_prompt_tokens=40)

    assert [spec.due_s for spec in found] == pytest.approx([0.0, 0.5, 1.0])
    assert {(spec.num_prompt_tokens, spec.num_output_tokens) for spec in found} == {(40, 4)}


def test_budgets_are_multiples_of_the_unloaded_time() -> None:
    unloaded = Unloaded(lambda num_tokens: 0.001 * num_tokens, 0.01)
    spec = RequestSpec(num_prompt_tokens=100, num_output_tokens=11)

    assert [c.latency_ms(unloaded, spec) for c in CLASSES] == [300.0, 600.0, 1600.0]
    assert sum(c.share for c in CLASSES) == pytest.approx(1.0)
    assert unloaded_times(CPU).e2e_s(spec) > 0.1


def test_a_machine_is_stretched_to_what_its_clients_saw() -> None:
    own, specs = unloaded_times(CPU), trace(10, 1.0)
    seen = Unloaded(lambda num_tokens: 1.5 * own.prefill_s(num_tokens), 1.5 * own.token_s)

    found = unloaded_times(stretched(CPU, seen, specs))

    assert found.token_s == pytest.approx(seen.token_s)
    assert found.prefill_s(300) == pytest.approx(seen.prefill_s(300))


def test_at_light_load_everything_is_met_at_nearly_full_depth() -> None:
    found = run("deadline", 0.1)

    assert number(found["goodput_share"]) >= 0.98
    assert number(found["mean_depth_share"]) >= 0.95


def test_under_load_depth_is_given_up_before_promises_are() -> None:
    full, ours = run("full", 6.0), run("deadline", 6.0)

    assert number(full["goodput_share"]) < 0.6
    assert number(ours["met_of_admitted"]) >= 0.95
    assert number(ours["goodput_share"]) >= 0.85
    assert 0.3 < number(ours["mean_depth_share"]) < 0.9


def test_the_model_learned_in_flight_is_close() -> None:
    found = run("deadline", 3.0)

    assert number(found["step_error_p50"]) < 0.10
    assert number(found["step_error_p95"]) < 0.30


def test_a_simulation_repeats_itself() -> None:
    assert run("deadline", 3.0) == run("deadline", 3.0)
