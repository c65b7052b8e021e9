"""The simulator runs the server's own scheduling: its figures must make sense."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.lib.budget_classes import CLASSES, Unloaded, plan_budgets, scaled
from benchmarks.lib.machines import (
    JUDGED,
    MACHINES,
    document_of,
    machine_named,
    machine_of,
    soft_scores,
)
from benchmarks.lib.replay import Crowd
from benchmarks.lib.systems import SYSTEMS
from benchmarks.lib.workload import RequestSpec
from benchmarks.simulate import find_half_rate, over_http, run_system, unloaded_times

from sortserve.core.schedule import DepthSchedule, ScheduleInfo
from sortserve.cost.machine import Machine
from sortserve.cost.model import RowShape, StepShape
from sortserve.cost.step_curve import StepCurve

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


def arguments_of(**values: object) -> argparse.Namespace:
    defaults = {"seed": 0, "on_miss": "reject", "min_quality": 0.5}
    return argparse.Namespace(**{**defaults, "lengths": 1.0, "max_prompt_tokens": 1024, **values})


def run(
    system: str, rate: float, *, on_miss: str = "reject", machine: Machine = CPU, count: int = 60
) -> dict[str, object]:
    unloaded, arguments = unloaded_times(machine), arguments_of(on_miss=on_miss)
    return run_system(machine, trace(count, rate), SYSTEMS[system], unloaded, arguments)


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


def test_budgets_are_the_same_for_every_system_and_a_pinned_one_names_its_exit_alone() -> None:
    unloaded, specs = unloaded_times(CPU), trace(20, 1.0)

    ours = plan_budgets(specs, unloaded, pinned=None, seed=3, min_quality=0.5)
    full = plan_budgets(specs, unloaded, pinned=30, seed=3, min_quality=0.5)

    assert [own.budget_class for own in ours] == [own.budget_class for own in full]
    assert {tuple(own.budget) for own in ours} == {("latency_ms", "on_miss", "min_quality")}
    assert all(own.budget == {"exit_layer": 30} for own in full)


def test_what_http_takes_is_added_to_a_step_whatever_it_runs() -> None:
    own = unloaded_times(CPU)
    seen = Unloaded(lambda num_tokens: own.prefill_s(num_tokens) + 0.004, own.token_s + 0.001)

    machine = over_http(CPU, seen)

    found = unloaded_times(machine)
    assert found.token_s == pytest.approx(seen.token_s, rel=0.02)
    assert found.prefill_s(64) == pytest.approx(seen.prefill_s(64), rel=0.05)
    assert found.prefill_s(512) == pytest.approx(seen.prefill_s(512), rel=0.05)
    rows = StepShape.of([RowShape(30, 1, 256, samples=True)] * 16)
    assert machine.step_s(rows) - CPU.step_s(rows) == pytest.approx(0.001, abs=0.002)


def test_arithmetic_that_has_become_slower_is_told_from_what_http_takes() -> None:
    own = unloaded_times(CPU)
    seen = Unloaded(lambda num_tokens: 1.5 * own.prefill_s(num_tokens) + 0.004, own.token_s)

    found = unloaded_times(over_http(CPU, seen))

    assert found.token_s == pytest.approx(seen.token_s, rel=0.02)
    assert found.prefill_s(64) == pytest.approx(seen.prefill_s(64), rel=0.05)
    assert found.prefill_s(256) == pytest.approx(seen.prefill_s(256), rel=0.1)
    assert found.prefill_s(512) == pytest.approx(seen.prefill_s(512), rel=0.05)


def test_what_a_crowd_takes_beyond_is_so_much_for_each_row() -> None:
    one, half, all_rows = (
        StepShape.of([RowShape(30, 1, 96, samples=True)] * n) for n in (1, 16, 32)
    )
    alone = over_http(CPU, unloaded_times(CPU))
    crowd = Crowd(32, 96, alone.step_s(all_rows) + 0.016)

    machine = over_http(CPU, unloaded_times(CPU), crowd)

    def more_s(shape: StepShape) -> float:
        return machine.step_s(shape) - alone.step_s(shape)

    assert more_s(all_rows) == pytest.approx(0.016)
    assert more_s(half) == pytest.approx(0.016 * 15 / 31)
    assert more_s(one) == pytest.approx(0.0, abs=1e-9)


def test_a_machine_that_has_become_faster_is_believed() -> None:
    own = unloaded_times(CPU)
    seen = Unloaded(lambda num_tokens: 0.8 * own.prefill_s(num_tokens), 0.8 * own.token_s)

    found = unloaded_times(over_http(CPU, seen))

    assert found.token_s == pytest.approx(seen.token_s, rel=0.02)
    assert found.prefill_s(512) == pytest.approx(seen.prefill_s(512), rel=0.05)


def test_full_depth_meets_half_at_the_rate_that_is_found() -> None:
    specs, unloaded = trace(60, 1.0), unloaded_times(CPU)

    rate = find_half_rate(CPU, specs, unloaded, arguments_of())

    assert number(run("full", rate)["goodput_share"]) == pytest.approx(0.5, abs=0.1)


def test_the_published_scores_are_relative_to_full_depth() -> None:
    scores, plain = soft_scores(JUDGED[40]), soft_scores(0.0)

    for each in (scores, plain):
        assert list(each) == [12, 16, 20, 24, 28, 32, 36, 40]
        assert each[40] == 1.0
        assert list(each.values()) == sorted(each.values())
    assert plain[32] == 1.0, "it ties the plainly fine-tuned model"
    assert scores[32] == pytest.approx(1.009 / 1.091)
    assert scores[20] == pytest.approx((1 + JUDGED[20]) / (1 + JUDGED[40]))


def test_the_13b_machine_is_the_model_of_that_name() -> None:
    machine = MACHINES["soft-13b"]

    step_s = machine.step_s(StepShape.of([RowShape(40, 1, 1, samples=True)]))
    weights = 2 * (40 * 317.2e6 + 163.84e6)  # bytes that a step at full depth reads
    assert step_s == pytest.approx(1e-3 + weights / (0.8 * 3.35e12), rel=0.01)
    assert machine.compute[20] == pytest.approx(0.506, abs=0.002)
    num_tokens = machine.num_pages * 16 * 4 / 40  # at full depth; 819,200 bytes each
    assert num_tokens == pytest.approx((0.9 * 80e9 - 26.03e9) / 819_200, rel=0.01)


def test_at_light_load_everything_is_met_at_nearly_full_depth() -> None:
    found = run("quality", 0.1)

    assert number(found["goodput_share"]) >= 0.98
    assert number(found["mean_depth_share"]) >= 0.95


def test_under_load_depth_is_given_up_before_promises_are() -> None:
    full, ours = run("full", 6.0), run("attainment", 6.0)

    assert number(full["goodput_share"]) < 0.6
    assert number(ours["met_of_admitted"]) >= 0.95
    assert number(ours["goodput_share"]) >= 0.85
    assert 0.3 < number(ours["mean_depth_share"]) < 0.9


def test_the_model_learned_in_flight_is_close() -> None:
    found = run("quality", 3.0)

    assert number(found["step_error_p50"]) < 0.10
    assert number(found["step_error_p95"]) < 0.30


def test_a_simulation_repeats_itself() -> None:
    assert run("quality", 3.0) == run("quality", 3.0)


SHIPPED = {18: 0.497, 21: 0.650, 24: 0.798, 27: 0.866, 30: 1.0}
FREE_ROWS = replace(
    CPU,
    name="free rows",
    source="made up: what a step costs, it costs before its first row",
    exits=tuple(SHIPPED),
    small=(2e-3, 3.35e-4, 5.5e-6, 2e-8, 3.5e-5),
    large=(2e-3, 3.35e-4, 4.5e-6, 2e-8, 3.5e-5),
    compute={e: e / 30 for e in SHIPPED},
    score=SHIPPED,
)


@pytest.mark.parametrize("rate", [12.0, 24.0])
def test_where_rows_ride_nearly_free_ours_is_no_worse_than_lock_step(rate: float) -> None:
    """Pacing alone was: each step left a little time, too little for a prompt to begin with."""
    ours, lock_step = (
        run(system, rate, machine=FREE_ROWS, count=150) for system in ("quality", "lockstep")
    )

    assert number(ours["quality_goodput"]) >= number(lock_step["quality_goodput"])
    assert number(ours["met_of_admitted"]) >= 0.97


def test_a_machine_that_was_measured_can_be_simulated_elsewhere(tmp_path: Path) -> None:
    schedule = ScheduleInfo(
        schedule=DepthSchedule.parse("0:30,32:27"), num_tokens=128, compute=0.94
    )
    curve = StepCurve(
        start_s=(1e-3, 2e-3), layer_s=tuple(1e-4 * i for i in range(1, 12)), kv_s=(0.0, 1e-8),
        sampled_s=1e-4,
    )  # fmt: skip
    machine = replace(FREE_ROWS, curve=curve, schedules=(schedule,))
    page = tmp_path / "page.md"
    line = json.dumps({"results": {"machine": document_of(machine)}})
    page.write_text(f"| a table |\n\n```\n{line}\n```\n", encoding="utf-8")

    assert machine_of(json.loads(json.dumps(document_of(machine)))) == machine
    assert machine_named(str(page)) == machine
    assert machine_named("cpu2") is CPU


def test_a_machine_that_nobody_knows_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no JSON here", encoding="utf-8")

    for name in ("laptop", str(tmp_path / "page.md")):
        with pytest.raises(ValueError, match=f"--machine '{name}' is none of a100, cpu2, "):
            machine_named(name)
