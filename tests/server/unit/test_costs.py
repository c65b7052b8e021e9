"""The one holder of the cost model: what is known of steps, and how it changes."""

from __future__ import annotations

import pytest

from sortserve.cost.costs import Costs
from sortserve.cost.learner import REFIT_STEPS, CostLearner
from sortserve.cost.model import RowShape, StepShape
from support.timed import MODEL

SHAPE = StepShape.of([RowShape(6, 1, 10, samples=True)])


def learner() -> CostLearner:
    """Knows of one kind of step, that it takes ten milliseconds."""
    return CostLearner([(SHAPE, 0.01)])


def test_at_first_nothing_is_known() -> None:
    costs = Costs()

    costs.observe(SHAPE, 0.01)

    assert costs.model is None


def test_a_model_that_is_given_stays_as_it_is_whatever_steps_take() -> None:
    costs = Costs()
    costs.learn_from(learner())
    costs.use(MODEL)

    for _ in range(REFIT_STEPS):
        costs.observe(SHAPE, 1.0)

    assert costs.model is MODEL


def test_a_learned_model_follows_the_steps() -> None:
    costs = Costs()
    costs.learn_from(learner())

    for _ in range(REFIT_STEPS):
        costs.observe(SHAPE, 0.02)

    assert costs.model is not None
    assert 0.011 < costs.model.step_s(SHAPE) < 0.02


def test_a_learner_that_raises_leaves_the_model_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    costs, broken = Costs(), learner()
    costs.learn_from(broken)
    model = costs.model
    monkeypatch.setattr(broken, "observe", lambda *args: 1 / 0)

    costs.observe(SHAPE, 0.02)

    assert costs.model is model
    assert "could not learn from a step" in caplog.text
