"""Calibrations: what is timed, kept between starts, checked before it is believed, drawn."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.cli import main
from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import SampledToken
from sortserve.core.slabs import Slabs
from sortserve.cost.cache import cache_path, read_samples, write_samples
from sortserve.cost.calibration import (
    SURVEY_ROUNDS,
    calibrate,
    fault_of,
    slowed,
    spot_check,
    survey,
)
from sortserve.cost.model import (
    REGIME_TOKENS,
    CostModel,
    RowShape,
    Samples,
    StepShape,
    step_shape,
)
from sortserve.cost.synthetic import DECODE_ROWS, PREFILL_TOKENS, SURVEY_ROWS, SURVEY_TOKENS
from sortserve.process.plot import Series, line_chart
from sortserve.process.profiling import chart, table
from support.scripted import FakeClock
from support.tiny_models import make_tiny_checkpoint

TRUTH = CostModel((2e-3, 5e-4, 2e-5, 2e-8, 5e-5), (3e-3, 6e-4, 1e-5, 1e-8, 5e-5))
EXITS = (9, 15, 30)
LIMITS: dict[str, Any] = {
    "exits": EXITS,
    "vocab_size": 100,
    "max_model_len": 2048,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 256,
}

KEY = {"machine": "one", "dtype": "bf16", "threads": 2}


def samples() -> list[tuple[StepShape, float]]:
    shapes = [
        StepShape.of([RowShape(layers, 1, 10, samples=True)] * rows)
        for layers in (2, 6)
        for rows in (1, 8, 64)
    ]
    return [(shape, 1e-3 * (1 + shape.num_layers + shape.num_tokens / 10)) for shape in shapes]


def test_a_calibration_comes_back_as_it_was(tmp_path: Path) -> None:
    path = cache_path(tmp_path, KEY)

    write_samples(path, samples(), KEY)

    assert read_samples(path) == samples()
    assert json.loads(path.read_text())["key"]["machine"] == "one"


@pytest.mark.parametrize("change", [{"machine": "two"}, {"dtype": "fp32"}, {"threads": 4}])
def test_another_machine_dtype_or_thread_count_has_its_own(
    tmp_path: Path, change: dict[str, object]
) -> None:
    assert cache_path(tmp_path, {**KEY, **change}) != cache_path(tmp_path, KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"format_version": 0}',
        '{"format_version": 1}',
        '{"format_version": 1, "samples": []}',
        '{"format_version": 1, "samples": [[[1], 2]]}',
        '{"format_version": 1, "samples": {"1": 2}}',
        '{"format_version": 1, "samples": [[[6, 1, 6, 60, 1], 0]]}',
        '{"format_version": 1, "samples": [[[6, 1, 6, 60, 1], NaN]]}',
        '{"format_version": 1, "samples": [[[6, 1, 6, 60, 1], Infinity]]}',
        '{"format_version": 1, "samples": [[[6, 1, 6, 60, 1], -1]]}',
        '{"format_version": 1, "samples": [[[6, 1, 6, 60, 1], "1"]]}',
        '{"format_version": 1, "samples": [[[6, 1, 6, 60, 1], 1%s]]}' % ("0" * 400),
        '{"format_version": 1, "samples": [[[6, 1, 6, 60, 1%s], 1]]}' % ("0" * 400),
        '{"format_version": 1, "samples": [[[6, 1, 6, 1e999, 1], 1]]}',
        '{"format_version": 1, "samples": [[[6, 1, 6, -60, 1], 1]]}',
        '{"format_version": 1, "samples": [[[0, 1, 6, 60, 1], 1]]}',
        '{"format_version": 1, "samples": [["61661", 1]]}',
        "[" * 100_000,
        " " * 5_000_000,
    ],
    ids=lambda text: text[:70],
)
def test_a_file_that_cannot_be_used_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)

    assert read_samples(path) is None


def test_a_pipe_in_place_of_the_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")

    assert read_samples(tmp_path / "pipe.json") is None


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    write_samples(tmp_path / "file" / "calibration.json", samples(), KEY)


def test_the_table_and_the_chart_show_each_sample() -> None:
    model = CostModel.fit(samples())

    text, drawing = table(samples(), model), ElementTree.fromstring(chart(samples(), model, "a<b"))

    assert len(text.splitlines()) == 1 + 6 + 4
    words = [e.text for e in drawing.iter() if e.tag.endswith("text")]
    assert words.count("a<b: time of a step, modelled (line) and measured (dots)") == 1
    assert {"2 layers", "6 layers", "tokens in the step", "ms"} <= set(words)
    groups = [e for e in drawing.iter() if e.get("clip-path") and e.tag.endswith("g")]
    assert sum(len(group) for group in groups) == 6, "a dot a sample"


def test_the_same_figures_give_the_same_bytes() -> None:
    model = CostModel.fit(samples())

    assert chart(samples(), model, "m") == chart(samples(), model, "m")


def test_an_empty_chart_is_a_drawing_too() -> None:
    drawing = line_chart("nothing", "x", "y", [Series("", [], colour=0)])

    assert ElementTree.fromstring(drawing).tag.endswith("svg")


def test_without_matplotlib_nothing_is_measured_for_a_plot_and_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sortserve.process.profiling.find_spec", lambda name: None)

    assert main(["profile", str(tmp_path / "no model"), "--plot", str(tmp_path / "p.svg")]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--plot needs matplotlib, which is not installed: pip install 'sortserve[plot]'")
    )


def test_a_profile_is_printed_drawn_and_used_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 6))
    plot = tmp_path / "profile.svg"

    monkeypatch.setattr("sortserve.cost.calibration.REPEATS", 1)
    monkeypatch.setattr("sortserve.cost.calibration.MAX_MEDIAN_ERROR", math.inf)  # a busy machine
    monkeypatch.setattr("sortserve.cost.synthetic.DECODE_ROWS", (1, 2))
    monkeypatch.setattr("sortserve.cost.synthetic.PREFILL_TOKENS", (16, 60))
    small = ["--max-model-len=64", "--max-num-seqs=4"]
    small.append("--backend=reference")  # nothing to compile for a cache of its own

    code = main(["profile", str(checkpoint), *small, "--plot", str(plot)])

    assert code == 0
    assert "95th percentile" in capsys.readouterr().out
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")
    (kept,) = (tmp_path / "cache" / "calibration").iterdir()
    assert read_samples(kept) is not None


# ---- what is timed ----


class Machine:
    """Takes the time that a model says, times some noise, and remembers what it ran."""

    block_size, slabs = 16, Slabs(3)

    def __init__(
        self,
        *,
        model: CostModel = TRUTH,
        slow: float = 1.0,
        noise: Callable[[], float] = lambda: 1.0,
        num_pages: int = 100_000,
    ) -> None:
        self.clock = FakeClock(now=0.0)
        self.num_pages = num_pages
        self.plans: list[StepPlan] = []
        self._model, self._slow, self._noise = model, slow, noise

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        self.plans.append(plan)
        self.clock.now += self._slow * self._model.step_s(step_shape(plan)) * self._noise()
        return []


def calibrated(machine: Machine, **limits: Any) -> list[tuple[StepShape, float]]:
    return calibrate(machine, clock=machine.clock, **{**LIMITS, **limits})


def tokens_of(samples: Samples) -> list[int]:
    return [shape.num_tokens for shape, _ in samples]


def test_a_quick_machine_times_every_size_at_three_depths_and_two_contexts() -> None:
    found = calibrated(Machine(slow=0.01))

    shapes = [shape for shape, _ in found]
    num_prompts, num_decodes = 3 * len(PREFILL_TOKENS), 3 * 2 * len(DECODE_ROWS)
    assert len(set(shapes)) == len(shapes) == num_prompts + 2 + num_decodes  # 2 of a crowd's
    assert {shape.num_layers for shape in shapes} == set(EXITS)
    assert set(tokens_of(found)) == {*PREFILL_TOKENS, *DECODE_ROWS}


def test_however_slow_the_machine_prompts_are_timed_first_and_then_rows_that_decode() -> None:
    machine = Machine(slow=1000.0)  # the first step takes longer than there is time

    found = calibrated(machine)

    assert [n > REGIME_TOKENS for n in tokens_of(found)] == [True] * 6 + [False] * 6
    assert set(tokens_of(found)) == {64, 128, 1, 32}
    crowd = [shape for shape, _ in found if shape.num_sampled == shape.num_tokens == 128]
    assert {shape.num_layers for shape in crowd} == {EXITS[0], EXITS[-1]}
    assert len(machine.plans) == 1 + len(found)  # and each of them once only
    assert fault_of(found, machine, **LIMITS) is None


def test_the_few_steps_of_a_slow_machine_tell_all_costs_apart() -> None:
    slow, all_samples = calibrated(Machine(slow=1000.0)), calibrated(Machine(slow=0.01))

    model = CostModel.fit(slow)

    for shape, seconds in all_samples:
        assert model.step_s(shape) == pytest.approx(seconds * 1e5, rel=0.02)
    rows = [RowShape(30, 1, 2000, samples=True)] * 8
    for shape in (StepShape.of(rows), StepShape.of([*rows, RowShape(9, 300, 700, samples=False)])):
        assert model.step_s(shape) == pytest.approx(1000 * TRUTH.step_s(shape), rel=0.02)


def test_a_machine_in_between_gets_on_with_both_kinds_while_there_is_time() -> None:
    found = calibrated(Machine(slow=3.0))

    further = [n > REGIME_TOKENS for n in tokens_of(found)[12:]]
    assert 12 < len(found) < 38
    assert abs(sum(further) - sum(not large for large in further)) <= 1


@given(
    max_model_len=st.sampled_from([1, 2, 15, 16, 17, 40, 48, 49, 60, 300, 5000]),
    max_num_batched_tokens=st.sampled_from([1, 2, 31, 48, 49, 63, 100, 1024]),
    max_num_seqs=st.sampled_from([1, 2, 3, 31, 64]),
    exits=st.sampled_from([(3,), (3, 30), (9, 15, 30), (3, 6, 9, 12, 30)]),
    spare_pages=st.sampled_from([0, 7, 10_000]),
    slow=st.sampled_from([0.01, 1e3]),
)
@settings(max_examples=30, deadline=None)
def test_only_steps_are_timed_that_the_engine_could_run_and_each_kind_that_it_could(
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    exits: tuple[int, ...],
    spare_pages: int,
    slow: float,
) -> None:
    one = -(-max_model_len // 16) * (exits[-1] // 3)  # what the pool holds at least
    machine = Machine(slow=slow, num_pages=one + spare_pages)
    limits: dict[str, Any] = {
        **LIMITS,
        "exits": exits,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": max_num_seqs,
    }

    found = calibrated(machine, **limits)
    ratio = spot_check(machine, CostModel.fit(found), clock=machine.clock, **limits)
    survey(machine, clock=machine.clock, **{**limits, "budget_s": 0.0})

    for plan in machine.plans:
        assert 0 < plan.num_tokens <= max_num_batched_tokens
        assert len(plan.rows) <= max_num_seqs
        pages = np.concatenate([row.block_table_SB.ravel() for row in plan.rows])
        assert len(set(pages)) == len(pages)
        assert pages.max() < machine.num_pages
        for row in plan.rows:
            assert 0 <= row.start < row.context_len <= max_model_len
            assert row.block_table_SB.shape == (row.exit_layer // 3, -(-row.context_len // 16))
    assert fault_of(found, machine, **limits) is None
    assert 1 / 1.5 < ratio < 1.5
    can_be_large = min(max_num_batched_tokens, max_num_seqs * max_model_len) > REGIME_TOKENS
    if spare_pages == 10_000:
        assert any(n > REGIME_TOKENS for n in tokens_of(found)) is can_be_large


def test_steps_are_timed_in_rounds_so_that_no_moment_spoils_all_times_of_one() -> None:
    machine = Machine(slow=1.0)

    calibrated(machine)

    shapes = [step_shape(plan) for plan in machine.plans[1:]]
    assert shapes[:36] == shapes[:12] * 3
    assert len(set(shapes[:12])) == 12


@pytest.mark.parametrize("slow", [0.01, 1000.0])
@pytest.mark.parametrize("held_up", range(12))
def test_a_step_that_was_held_up_does_not_spoil_what_is_said_of_others(
    held_up: int, slow: float
) -> None:
    """A crowd's step, a prompt's and a single row's: as if all had been timed at leisure."""
    num_run = itertools.count(-1)  # the first is for warming up
    machine = Machine(slow=slow, noise=lambda: 6.0 if next(num_run) == held_up else 1.0)

    model = CostModel.fit(calibrated(machine))

    crowd = [RowShape(30, 1, 300, samples=True)] * 150
    for rows in (crowd, crowd[:8], crowd[:1], [RowShape(24, 500, 500, samples=True)]):
        truth = slow * TRUTH.step_s(StepShape.of(rows))
        assert truth / 1.5 < model.step_s(StepShape.of(rows)) < 1.8 * truth


def test_a_survey_times_many_steps_at_both_ends_of_the_depth_in_rounds() -> None:
    machine = Machine(slow=0.01, num_pages=100_000)

    found = survey(machine, clock=machine.clock, **LIMITS)

    assert set(tokens_of(found)) == {*SURVEY_ROWS, *SURVEY_TOKENS}
    assert {shape.num_layers for shape, _ in found} == {EXITS[0], EXITS[-1]}
    shapes = [step_shape(plan) for plan in machine.plans[1:]]  # the first is for warming up
    assert shapes == [shape for shape, _ in found]
    assert shapes == shapes[: len(shapes) // SURVEY_ROUNDS] * SURVEY_ROUNDS


def test_a_slow_machine_is_surveyed_once() -> None:
    slow = Machine(slow=1e3)

    found = survey(slow, clock=slow.clock, **LIMITS)

    assert len(slow.plans) == 1 + len(found)
    assert len({shape for shape, _ in found}) == len(found)


# ---- is the machine still what it was? ----


def checked(machine: Machine) -> tuple[float, int]:
    """The ratio that a check finds, and in how many steps."""
    ratio = spot_check(machine, TRUTH, clock=machine.clock, **LIMITS)
    return ratio, len(machine.plans)


def test_a_machine_as_it_was_is_known_by_one_run_of_each_step() -> None:
    ratio, num_steps = checked(Machine(slow=1.1))

    assert ratio == pytest.approx(1.1)
    assert num_steps == 1 + 5  # the first warms up


@pytest.mark.parametrize("slow", [0.5, 0.8, 1.25, 3.0])
def test_a_machine_that_has_changed_is_timed_as_often_as_a_calibration_does(slow: float) -> None:
    ratio, num_steps = checked(Machine(slow=slow))

    assert ratio == pytest.approx(slow)
    assert num_steps == 1 + 3 * 5


def test_a_machine_that_is_held_up_for_a_moment_has_not_changed() -> None:
    moments = iter([4.0] * 6)

    ratio, num_steps = checked(Machine(noise=lambda: next(moments, 1.0)))

    assert ratio == pytest.approx(1.0)
    assert num_steps == 1 + 3 * 5


# ---- what is believed ----


def noise(sigma: float) -> Callable[[], float]:
    rng = random.Random(5)
    return lambda: math.exp(rng.gauss(0.0, sigma))


def split(found: Samples) -> tuple[Samples, Samples]:
    """Small and large ones."""
    return (
        [s for s in found if s[0].num_tokens <= REGIME_TOKENS],
        [s for s in found if s[0].num_tokens > REGIME_TOKENS],
    )


def test_a_calibration_that_lacks_a_regime_is_not_believed() -> None:
    machine = Machine()
    small, large = split(calibrated(machine))

    assert fault_of(small, machine, **LIMITS) == "no large step was timed"
    assert fault_of(large, machine, **LIMITS) == "no small step was timed"


def test_where_no_step_can_be_large_none_is_missed() -> None:
    machine = Machine()
    small, _ = split(calibrated(machine))

    assert fault_of(small, machine, **{**LIMITS, "max_num_batched_tokens": 48}) is None


def test_a_calibration_that_does_not_predict_its_own_samples_is_not_believed() -> None:
    machine = Machine(noise=noise(0.1), slow=0.01)
    assert fault_of(calibrated(machine), machine, **LIMITS) is None

    rng = random.Random(1)
    small, large = split(calibrated(machine))
    wild = [(shape, rng.choice((0.001, 0.1, 10.0))) for shape, _ in large]

    fault = fault_of([*small, *wild], machine, **LIMITS)
    assert fault is not None
    assert fault.startswith("a fit misses half of the large steps by ")


def test_what_cannot_be_believed_is_served_with_slowed_down() -> None:
    machine = Machine(noise=noise(1.0), slow=0.01)
    found = calibrated(machine)

    careful = slowed(found)

    assert [shape for shape, _ in careful] == [shape for shape, _ in found]
    covered = sum(slow >= seconds for (_, slow), (_, seconds) in zip(careful, found, strict=True))
    assert covered >= 0.85 * len(found)
    assert fault_of(careful, machine, **LIMITS) is None
