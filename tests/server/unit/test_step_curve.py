"""The true time of a step, for the simulator: what was measured, between and beyond."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.cost.model import CostModel, RowShape, StepShape
from sortserve.cost.step_curve import KNOTS, StepCurve, spread

EXITS = (18, 30)


def decode(rows: int, context_len: int = 256, exit_layer: int = 30) -> StepShape:
    return StepShape.of([RowShape(exit_layer, 1, context_len, samples=True)] * rows)


def prompt(num_tokens: int, exit_layer: int = 30) -> StepShape:
    return StepShape.of([RowShape(exit_layer, num_tokens, num_tokens, samples=True)])


def weight_bound(shape: StepShape) -> float:
    """A layer reads its weights in as long as eight tokens take to multiply."""
    layer_s = 1e-4 * max(8.0, shape.layer_tokens / shape.num_layers)
    return 2e-3 + shape.num_layers * layer_s + 1e-8 * shape.layer_kv_tokens


def survey(seconds: object = weight_bound) -> list[tuple[StepShape, float]]:
    assert callable(seconds)
    rows = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
    shapes = [decode(n, c, e) for n in rows for c in (16, 768) for e in EXITS]
    shapes += [prompt(n, e) for n in (16, 32, 64, 128, 256, 512, 1024) for e in EXITS]
    return [(shape, seconds(shape)) for shape in shapes]


def test_few_rows_take_as_long_as_one_where_the_weights_are_what_is_read() -> None:
    curve, lines = StepCurve.fit(survey()), CostModel.fit(survey())

    for rows in (2, 3, 5, 7):
        assert curve.step_s(decode(rows)) == pytest.approx(weight_bound(decode(rows)), rel=0.04)
    assert lines.step_s(decode(7)) > 1.08 * weight_bound(decode(7))  # why there is a curve


@pytest.mark.parametrize("num_tokens", [20, 100, 300, 700, 1024, 2000])
def test_prompts_of_any_length_lie_on_it(num_tokens: int) -> None:
    curve = StepCurve.fit(survey())

    for exit_layer in EXITS:
        shape = prompt(num_tokens, exit_layer)
        assert curve.step_s(shape) == pytest.approx(weight_bound(shape), rel=0.05)


@given(
    st.lists(st.floats(1e-4, 1.0), min_size=8, max_size=8),
    st.integers(1, 3000),
    st.sampled_from(EXITS),
)
@settings(max_examples=25, deadline=None)
def test_whatever_was_measured_more_never_takes_less(
    times: list[float], num_tokens: int, exit_layer: int
) -> None:
    shapes = [decode(1), decode(8), decode(32), prompt(64), prompt(128), prompt(512), prompt(9)]
    curve = StepCurve.fit(list(zip([*shapes, decode(2, 16, 18)], times, strict=True)))

    few, more = prompt(num_tokens, exit_layer), prompt(num_tokens + 1, exit_layer)
    if num_tokens != 48:  # another start begins there
        assert 0.0 < curve.step_s(few) <= curve.step_s(more) + 1e-12
    assert len(curve.layer_s) == len(KNOTS)
    assert list(curve.layer_s) == sorted(curve.layer_s)


def test_of_a_step_that_was_run_several_times_the_median_counts() -> None:
    stumbled = [(shape, 10 * seconds) for shape, seconds in survey()]

    curve = StepCurve.fit([*survey(), *stumbled, *survey()])

    assert curve == StepCurve.fit(survey())


def test_the_spread_is_that_of_equal_steps() -> None:
    rng = random.Random(0)
    noisy = [(shape, s * rng.lognormvariate(0.0, 0.2)) for shape, s in survey() for _ in range(9)]

    assert spread(noisy) == pytest.approx(0.2, rel=0.1)
    assert spread(survey()) is None


def test_steps_can_be_made_later_and_slower() -> None:
    curve = StepCurve.fit(survey())

    later = curve.later(1e-3, 5e-3)
    assert later.step_s(decode(4)) == pytest.approx(curve.step_s(decode(4)) + 1e-3)
    assert later.step_s(prompt(64)) == pytest.approx(curve.step_s(prompt(64)) + 5e-3)
    slower = curve.slower(1.2, 1.5)
    assert slower.step_s(decode(4)) == pytest.approx(1.2 * curve.step_s(decode(4)))
    assert slower.step_s(prompt(64)) == pytest.approx(1.5 * curve.step_s(prompt(64)))
