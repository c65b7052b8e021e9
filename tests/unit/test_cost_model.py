"""Predicted times, and the exit chosen from them."""

from __future__ import annotations

import random

import pytest

from sortserve.budget import Budget, OnMiss
from sortserve.errors import BudgetUnattainableError
from sortserve.outputs import Estimate
from sortserve.scheduling.admission import choose_exit
from sortserve.scheduling.cost_model import CostModel, Load, RowShape, StepShape


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


def make_model(policy: str = "fair") -> CostModel:
    samples = [(shape, true_seconds(shape)) for shape in shapes(1, 80)]
    return CostModel.fit(samples, policy=policy, max_num_batched_tokens=512)


def test_a_fit_predicts_steps_that_it_has_not_seen() -> None:
    model = make_model()

    for shape in shapes(2, 40):
        assert model.step_s(shape) == pytest.approx(true_seconds(shape), rel=0.05)


def test_no_coefficient_is_negative_however_noisy_the_measurements() -> None:
    rng = random.Random(3)
    noisy = [(s, true_seconds(s) * rng.uniform(0.5, 2.0)) for s in shapes(4, 30)]

    model = CostModel.fit(noisy, policy="fair", max_num_batched_tokens=512)

    assert min(model.small + model.large) >= 0


def test_a_shallower_exit_is_predicted_faster_and_a_loaded_engine_slower() -> None:
    model = make_model()
    idle, busy = Load({}), Load({30: 16}, num_waiting_tokens=1000)

    def e2e(exit_layer: int, load: Load) -> float:
        return model.estimate(exit_layer, num_prompt_tokens=100, max_tokens=50, load=load).e2e_s

    assert e2e(9, idle) < e2e(15, idle) < e2e(30, idle)
    assert e2e(9, busy) > e2e(9, idle)
    assert e2e(30, busy) > e2e(30, idle)


def test_in_lockstep_a_shallow_exit_beside_deep_rows_gains_no_tpot() -> None:
    load = Load({30: 8})

    def tpot(policy: str) -> float:
        model = make_model(policy)
        return model.estimate(9, num_prompt_tokens=10, max_tokens=10, load=load).tpot_s

    assert tpot("fair") < 0.7 * tpot("lockstep")


def predict(exit_layer: int) -> Estimate:
    return Estimate(ttft_s=0.01 * exit_layer, tpot_s=0.001 * exit_layer, e2e_s=0.02 * exit_layer)


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (Budget(), 30),
        (Budget(latency_ms=1000), 30),
        (Budget(latency_ms=599), 15),
        (Budget(ttft_ms=100), 9),
        (Budget(tpot_ms=16, ttft_ms=5000), 15),
    ],
)
def test_the_deepest_exit_that_fits_is_chosen(budget: Budget, chosen: int) -> None:
    assert choose_exit(budget, (9, 15, 30), predict).exit_layer == chosen


def test_when_nothing_fits_degrade_serves_the_shallowest_and_says_so() -> None:
    choice = choose_exit(Budget(latency_ms=1), (9, 15, 30), predict)

    assert choice.exit_layer == 9
    assert not choice.fits


def test_when_nothing_fits_reject_answers_with_a_time_to_come_back() -> None:
    budget = Budget(latency_ms=1, on_miss=OnMiss.REJECT)

    with pytest.raises(BudgetUnattainableError, match="exit 9, needs 180 ms") as error:
        choose_exit(budget, (9, 15, 30), predict)

    assert error.value.param == "budget.latency_ms"
    assert error.value.retry_after_s is not None
    assert error.value.retry_after_s >= 1


def test_without_calibration_the_deepest_exit_is_taken_on_trust() -> None:
    choice = choose_exit(Budget(latency_ms=1), (9, 30), lambda exit_layer: None)

    assert choice.exit_layer == 30
    assert choice.estimate is None
