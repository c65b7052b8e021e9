"""The cost model kept true while it is used: refit with forgetting, residuals as safety (no torch).

A running server sees few kinds of steps, often the same one for minutes, and a fit to those alone
would forget what the others cost. So a regime's line minimises two sums of squared relative
errors: over the calibration's samples, as an anchor that is never forgotten, and over the steps
that run, each worth ``FORGET`` times less with every later one. The anchor's times follow the
machine's present speed: they are multiplied by the mean ratio of late steps to what the anchor
alone says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sortserve.cost.model import (
    REGIME_TOKENS,
    CostModel,
    Line,
    Samples,
    StepShape,
    by_regime,
    is_time,
    solve_non_negative,
)

__all__ = ["CostLearner"]

FORGET = 0.99
"""The weight of a step after each later one of its regime: about a hundred steps count."""
ANCHOR_STEPS = 25.0
"""How many running steps the calibration is worth."""
REFIT_STEPS = 8
"""Steps between two refits."""
DRIFT_SHARE = 0.05
"""Share of the newest step in the machine's present speed."""
MAX_RATIO = 4.0
"""A step further off than this factor (a suspended process, a page fault storm) counts as this."""
WINDOW_STEPS = 256
MIN_STEPS_FOR_SAFETY = 64
SAFETY_QUANTILE = 0.9
SAFETY_STEPS = 8
"""Steps whose times are summed for the safety factor. Promises span many steps, over which the
noise of single ones evens out while a wrong model does not."""
SAFETY_BOUNDS = (1.05, 2.0)


class CostLearner:
    """Owns the cost model: told of each step, it has a better one every few steps.

    Args:
        samples: the calibration's (shape, seconds).
    """

    def __init__(self, samples: Samples) -> None:
        usable = [sample for sample in samples if is_time(sample[1])]
        self.model = CostModel.fit(usable)
        small, large = by_regime(usable)
        self._small = _Regime(self.model.small, small)
        self._large = _Regime(self.model.large, large)
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        """Predicted and actual seconds of the latest steps."""
        self._num_steps = 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn from one executed step, if it took a time at all (``is_time``)."""
        if not is_time(seconds) or shape.num_tokens == 0:
            return
        predicted = max(self.model.step_s(shape), 1e-9)
        ratio = min(max(seconds / predicted, 1 / MAX_RATIO), MAX_RATIO)
        self._steps.append((predicted, predicted * ratio))
        regime = self._small if shape.num_tokens <= REGIME_TOKENS else self._large
        regime.observe(shape, predicted * ratio)
        self._num_steps += 1
        if self._num_steps % REFIT_STEPS == 0:
            self.model = replace(
                self.model,
                small=self._small.solve(),
                large=self._large.solve(),
                safety=self._safety(),
            )

    def _safety(self) -> float:
        if len(self._steps) < MIN_STEPS_FOR_SAFETY:
            return self.model.safety
        num_groups = len(self._steps) // SAFETY_STEPS
        latest = list(self._steps)[-num_groups * SAFETY_STEPS :]
        groups = (latest[i : i + SAFETY_STEPS] for i in range(0, len(latest), SAFETY_STEPS))
        ratios = sorted(sum(a for _, a in group) / sum(p for p, _ in group) for group in groups)
        low, high = SAFETY_BOUNDS
        return min(max(_quantile(ratios, SAFETY_QUANTILE), low), high)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours; numpy's takes longer than all else of a refit."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


class _Regime:
    """The sums of one regime's least squares."""

    def __init__(self, line: Line, samples: Samples) -> None:
        self._line = line
        self._anchor_line = line
        times = np.array([seconds for _, seconds in samples])
        weighted = np.array([shape.features for shape, _ in samples]) / times[:, None]
        weight = ANCHOR_STEPS / len(samples)
        self._anchor_matrix = weight * (weighted.T @ weighted)
        self._anchor_vector = weight * weighted.sum(axis=0)
        self._forget()
        self._changed = False

    def _forget(self) -> None:
        """Unlearn all but the calibration."""
        self._matrix = np.zeros_like(self._anchor_matrix)
        self._vector = np.zeros_like(self._anchor_vector)
        self._log_drift = 0.0

    def observe(self, shape: StepShape, seconds: float) -> None:
        features = np.array(shape.features)
        weighted = features / seconds
        self._matrix = FORGET * self._matrix + np.outer(weighted, weighted)
        self._vector = FORGET * self._vector + weighted
        anchor_s = max(float(features @ self._anchor_line), 1e-9)
        self._log_drift += DRIFT_SHARE * (math.log(seconds / anchor_s) - self._log_drift)
        self._changed = True

    def solve(self) -> Line:
        """The line that fits best now; where there is none the last good one, and a new start."""
        if self._changed:
            speed = math.exp(self._log_drift)
            line = solve_non_negative(
                self._matrix + self._anchor_matrix / speed**2,
                self._vector + self._anchor_vector / speed,
            )
            if line is None:
                self._forget()
            else:
                self._line = line
            self._changed = False
        return self._line
