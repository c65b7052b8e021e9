"""The time of a step: fitted to measurements, and kept true while it is used."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sortserve.scheduling.cost_learner import SAFETY_BOUNDS, CostLearner
from sortserve.scheduling.cost_model import CostModel, RowShape, StepShape


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


def test_a_suspended_process_does_not_ruin_the_fit() -> None:
    learned = learner()

    for shape in shapes(9, 400):
        learned.observe(shape, true_seconds(shape))
    learned.observe(shapes(10, 1)[0], 3600.0)

    assert errors_of(learned.model, 1.0, seed=11)[30] < 0.1


def test_a_step_without_time_or_tokens_teaches_nothing() -> None:
    learned = learner()
    before = learned.model

    for _ in range(20):
        learned.observe(shapes(12, 1)[0], 0.0)
        learned.observe(StepShape.of([]), 1.0)

    assert learned.model is before
