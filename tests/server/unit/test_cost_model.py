"""The time of a step: fitted to measurements, and kept true while it is used."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sortserve.cost.learner import SAFETY_BOUNDS, CostLearner
from sortserve.cost.model import (
    LEAST,
    MOST_S,
    CostModel,
    Line,
    RowShape,
    StepShape,
    solve_non_negative,
)
from sortserve.scheduling.demand import StepCosts

NOTHING: Line = (0.0, 0.0, 0.0, 0.0, 0.0)
NO_TIMES = (0.0, -1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300)


def true_seconds(shape: StepShape) -> float:
    return (
        1e-3
        + 4e-4 * shape.num_layers
        + 2e-6 * shape.layer_tokens
        + 1e-9 * shape.layer_kv_tokens
        + 5e-5 * shape.num_sampled
    )


def shapes(seed: int, count: int) -> list[StepShape]:
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        rows = [
            RowShape(rng.choice((9, 15, 30)), rng.choice((1, 1, 1, 64, 300)), 400, samples=True)
            for _ in range(rng.randint(1, 16))
        ]
        result.append(StepShape.of(rows))
    return result


def make_model() -> CostModel:
    return CostModel.fit([(shape, true_seconds(shape)) for shape in shapes(1, 80)])


def test_a_fit_predicts_steps_that_it_has_not_seen() -> None:
    model = make_model()

    for shape in shapes(2, 40):
        assert model.step_s(shape) == pytest.approx(true_seconds(shape), rel=0.05)


def test_no_coefficient_is_negative_however_noisy_the_measurements() -> None:
    rng = random.Random(3)
    noisy = [(s, true_seconds(s) * rng.uniform(0.5, 2.0)) for s in shapes(4, 30)]

    model = CostModel.fit(noisy)

    assert min(model.small + model.large) >= 0


def test_the_prediction_of_a_prompt_is_that_of_its_chunks() -> None:
    model = make_model()

    chunks = [RowShape(15, 100, done, samples=done == 300) for done in (100, 200, 300)]
    steps = sum(model.step_s(StepShape.of([chunk])) for chunk in chunks)

    assert model.prefill_s(15, 300, chunk=100) == pytest.approx(steps, rel=0.01)
    assert model.prefill_s(15, 0) == 0.0


# ---- whatever was fitted, times can be divided by ----


def test_a_model_of_zeros_still_says_that_everything_takes_some_time() -> None:
    costs = StepCosts(CostModel(NOTHING, NOTHING))

    assert costs.model.small == costs.model.large == LEAST
    assert costs.token_s(1, 0) == 1e-12
    assert costs.row_s(1, 0) == 1e-12
    assert costs.base_s(1) == 1e-9
    assert costs.prefill_s(1, 1) > 0.0


def test_infinite_and_negative_coefficients_are_brought_within_bounds() -> None:
    model = CostModel((math.inf, -1.0, 1e300, 0.5, -math.inf), NOTHING, safety=math.inf)

    assert model.small == (MOST_S, 0.0, MOST_S, 0.5, 0.0)
    assert model.safety == 100.0
    assert math.isfinite(model.step_s(StepShape(1000, 10**7, 10**10, 10**16, 10**5)))


@pytest.mark.parametrize("field", ["small", "large", "safety"])
def test_a_model_that_is_not_made_of_numbers_is_refused(field: str) -> None:
    value: Any = math.nan if field == "safety" else (1e-3, math.nan, 0.0, 0.0, 0.0)

    with pytest.raises(ValueError, match="made of numbers"):
        dataclasses.replace(make_model(), **{field: value})


def test_samples_that_are_no_times_do_not_spoil_a_fit() -> None:
    good = [(shape, true_seconds(shape)) for shape in shapes(1, 80)]
    bad = list(zip(shapes(2, 7), NO_TIMES, strict=True))

    assert CostModel.fit(good + bad) == CostModel.fit(good)
    assert CostLearner(good + bad).model == CostModel.fit(good)


def test_without_a_finite_answer_there_is_no_line() -> None:
    ones = np.ones(5)

    assert solve_non_negative(np.full((5, 5), math.inf), ones) is None
    assert solve_non_negative(np.eye(5), np.full(5, math.nan)) is None


def test_a_decomposition_that_does_not_converge_gives_no_line_and_a_fit_the_median(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(np.linalg, "lstsq", no_answer)
    shape = StepShape.of([RowShape(6, 1, 10, samples=True)])

    assert solve_non_negative(np.eye(5), np.ones(5)) is None
    assert CostModel.fit([(shape, s) for s in (0.01, 0.02, 0.5)]).step_s(shape) == pytest.approx(
        0.02
    )


def no_answer(*args: object, **kwargs: object) -> None:
    raise np.linalg.LinAlgError("SVD did not converge in Linear Least Squares")


# ---- refit ----


def learner() -> CostLearner:
    return CostLearner([(shape, true_seconds(shape)) for shape in shapes(1, 80)])


def errors_of(model: CostModel, speed: float, seed: int) -> list[float]:
    tests = shapes(seed, 60)
    return sorted(abs(model.step_s(s) / (speed * true_seconds(s)) - 1) for s in tests)


def test_a_machine_that_slows_down_is_followed() -> None:
    learned = learner()

    for shape in shapes(5, 300):
        learned.observe(shape, 1.7 * true_seconds(shape))

    assert errors_of(learned.model, 1.7, seed=6)[30] < 0.05


def test_one_kind_of_step_for_minutes_does_not_unlearn_the_others() -> None:
    learned = learner()
    steady = StepShape.of([RowShape(30, 1, 300, samples=True)] * 8)

    for _ in range(2000):
        learned.observe(steady, 1.5 * true_seconds(steady))

    errors = errors_of(learned.model, 1.5, seed=7)
    assert learned.model.step_s(steady) == pytest.approx(1.5 * true_seconds(steady), rel=0.02)
    small = StepShape.of([RowShape(9, 1, 300, samples=True)])
    assert learned.model.step_s(small) == pytest.approx(1.5 * true_seconds(small), rel=0.1)
    assert errors[30] < 0.6  # the large regime has seen nothing, and keeps the calibration


def safety_after(ratio: Callable[[int], float]) -> float:
    """What the safety factor is once 400 steps have taken so many times what is true."""
    learned = learner()
    for i, shape in enumerate(shapes(9, 400)):
        learned.observe(shape, true_seconds(shape) * ratio(i))
    return learned.model.safety


def test_the_safety_factor_covers_slow_stretches_more_than_noise_that_evens_out() -> None:
    low, high = SAFETY_BOUNDS
    noise, stretches = random.Random(8), random.Random(8)
    slow = [stretches.lognormvariate(0.0, 0.25) for _ in range(40)]

    calm = safety_after(lambda i: 1.0)
    noisy = safety_after(lambda i: noise.lognormvariate(0.0, 0.25))
    uneven = safety_after(lambda i: slow[i // 10])

    assert calm == low
    assert low < noisy < 1.25 < uneven < high


def test_a_slow_stretch_that_is_over_raises_the_safety_factor_for_ten_seconds_at_most() -> None:
    learned, noise = learner(), random.Random(8)
    slow = [noise.choice((0.8, 1.3)) for _ in range(40)]
    steady = StepShape.of([RowShape(30, 1, 300, samples=True)] * 8)
    for i in range(400):
        learned.observe(steady, true_seconds(steady) * slow[i // 10])
    uneven = learned.model.safety

    for i in range(64):
        learned.observe(steady, true_seconds(steady), 1e3 + 0.2 * i)

    assert uneven > CostModel.safety
    assert learned.model.safety == CostModel.safety


def test_a_suspended_process_does_not_ruin_the_fit() -> None:
    learned = learner()

    for shape in shapes(9, 400):
        learned.observe(shape, true_seconds(shape))
    learned.observe(shapes(10, 1)[0], 3600.0)

    assert errors_of(learned.model, 1.0, seed=11)[30] < 0.1


@pytest.mark.parametrize("seconds", NO_TIMES)
def test_a_step_without_time_or_tokens_teaches_nothing(seconds: float) -> None:
    learned = learner()
    before = learned.model

    for _ in range(20):
        learned.observe(shapes(12, 1)[0], seconds)
        learned.observe(StepShape.of([]), 1.0)

    assert learned.model is before


def test_where_nothing_fits_the_last_good_line_stays_and_learning_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned = learner()
    for shape in shapes(5, 80):
        learned.observe(shape, true_seconds(shape))
    good = learned.model
    with monkeypatch.context() as patched:
        patched.setattr(np.linalg, "lstsq", no_answer)
        for shape in shapes(6, 80):
            learned.observe(shape, 3.0 * true_seconds(shape))
        assert (learned.model.small, learned.model.large) == (good.small, good.large)

    for shape in shapes(7, 300):
        learned.observe(shape, 1.7 * true_seconds(shape))

    assert errors_of(learned.model, 1.7, seed=8)[30] < 0.05
