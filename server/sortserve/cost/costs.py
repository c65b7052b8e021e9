"""What steps cost, as far as anybody knows: the one place that says which cost model holds now."""

from __future__ import annotations

import logging

from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, StepShape

__all__ = ["Costs"]

logger = logging.getLogger(__name__)


class Costs:
    """Holds the cost model that all reckon with; nothing is known until it is given one.

    A model is a frozen value and is replaced whole, so any thread may read ``model``; whoever needs
    it more than once for one answer reads it once. Only the engine's thread changes it.
    """

    def __init__(self) -> None:
        self._model: CostModel | None = None
        self._learner: CostLearner | None = None

    @property
    def model(self) -> CostModel | None:
        """The present one; None: nobody knows, and every budget counts as possible."""
        return self._model

    @property
    def is_learning(self) -> bool:
        """Whether the steps that run can change the model."""
        return self._learner is not None

    def use(self, model: CostModel | None) -> None:
        """Reckon with a model as it stands, whatever steps take."""
        self._model, self._learner = model, None

    def learn_from(self, learner: CostLearner) -> None:
        """Use a learner's model, and let it learn from every step."""
        self._model, self._learner = learner.model, learner

    def observe(self, shape: StepShape, seconds: float, ended_s: float | None = None) -> None:
        """A step has run, and ended then: refit the model. If that fails, it stays as it is."""
        if self._learner is None:
            return
        try:
            self._learner.observe(shape, seconds, ended_s)
            self._model = self._learner.model
        except Exception:
            logger.exception("the cost model could not learn from a step and stays as it is")
