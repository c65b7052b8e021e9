"""The cost model kept true while it is used: refit with forgetting, residuals as safety (no torch).

A running server sees few kinds of steps, often the same one for minutes, and a fit to those alone
would forget what the others cost. So a regime's line minimises two sums of squared relative
errors: over the calibration's samples, as an anchor that is never forgotten, and over the steps
that run, each worth a little less with every later one. The anchor's times follow the
machine's present speed: they are multiplied by the mean ratio of late steps to what the anchor
alone says.

That follows a slow drift. A change at once (a neighbour on the same machine comes or goes) is seen
by a ``ChangeDetector``: the regime starts again from the calibration at the new speed. Machines
change as a whole, so the other regime goes with it, and on with its drift, as long as its own steps
say nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sortserve.cost.changes import Change, ChangeDetector
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

FORGET_SHARE = 0.01
"""What a step loses of its weight with each later one of its regime: about a hundred count."""
ANCHOR_STEPS = 25.0
"""How many running steps the calibration is worth."""
REFIT_STEPS = 8
"""Steps between two refits."""
DRIFT_SHARE = 0.05
"""Share of the newest step in the machine's present speed."""
FADE_S = 5.0
MOST_FADED = 0.2
"""Where steps are rare, time takes the place of their number: a step has the share that fades in
the time since the one before it, with this time constant, at most a fifth."""
MAX_RATIO = 4.0
"""A step further off than this factor (a suspended process, a page fault storm) counts as this."""
NUM_EVIDENCE = 8
"""The latest steps of a change: the new speed is their median."""
OWN_STEPS = 3
"""So many steps of its own say that a regime has not changed with the other."""
WINDOW_STEPS = 256
MIN_STEPS_FOR_SAFETY = 64
SAFETY_QUANTILE = 0.9
SAFETY_STEPS = 8
"""Steps whose times are summed for the safety factor. Promises span many steps, over which the
noise of single ones evens out while a wrong model does not."""
SAFETY_BOUNDS = (1.05, 2.0)
SAFETY_S = 10.0
"""No step raises the factor above the default for longer."""


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
        self._steps: deque[_Timed] = deque(maxlen=WINDOW_STEPS)
        self._num_steps = 0
        self._now = 0.0

    def observe(self, shape: StepShape, seconds: float, ended_s: float | None = None) -> None:
        """Learn from one executed step, if it took a time at all (``is_time``).

        Args:
            shape: what ran.
            seconds: how long.
            ended_s: when it was over, on a clock that never goes back; None: it began when the step
                before it was over.
        """
        if not is_time(seconds) or shape.num_tokens == 0:
            return
        self._now = self._now + seconds if ended_s is None else ended_s
        predicted = max(self.model.step_s(shape), 1e-9)
        ratio = min(max(seconds / predicted, 1 / MAX_RATIO), MAX_RATIO)
        self._steps.append(_Timed(predicted, predicted * ratio, self._now))
        is_small = shape.num_tokens <= REGIME_TOKENS
        regime, other = (self._small, self._large) if is_small else (self._large, self._small)
        change = regime.observe(shape, seconds, seconds / predicted, self._now)
        self._num_steps += 1
        if change is not None:
            self._change_speed(regime, other, change)
        elif self._num_steps % REFIT_STEPS == 0:
            self._refit(self._safety())

    def _change_speed(self, regime: _Regime, other: _Regime, change: Change) -> None:
        """The machine has another speed: what was late or early before says nothing."""
        was_guess = regime.is_guess
        regime.start_again(change)
        if not was_guess and other.num_steps_since(change.since_s) < OWN_STEPS:
            other.follow(change.level, change.since_s)
        self._steps.clear()
        self._refit(CostModel.safety)

    def _refit(self, safety: float) -> None:
        self._small.keep_up(self._large.log_drift)
        self._large.keep_up(self._small.log_drift)
        small, large = self._small.solve(), self._large.solve()
        self.model = replace(self.model, small=small, large=large, safety=safety)

    def _safety(self) -> float:
        """Of all steps of the window; what goes beyond the default, of the latest seconds."""
        if len(self._steps) < MIN_STEPS_FOR_SAFETY:
            return self.model.safety
        safety = _slow_stretch(list(self._steps))
        if safety > CostModel.safety:
            late = [step for step in self._steps if step.ended_s >= self._now - SAFETY_S]
            enough = len(late) >= MIN_STEPS_FOR_SAFETY
            safety = max(_slow_stretch(late), CostModel.safety) if enough else CostModel.safety
        low, high = SAFETY_BOUNDS
        return min(max(safety, low), high)


class _Timed(NamedTuple):
    """A step of the safety factor's window."""

    predicted_s: float
    actual_s: float
    ended_s: float


def _slow_stretch(steps: Sequence[_Timed]) -> float:
    """Actual over predicted of a slow one among the stretches of some steps."""
    latest = steps[len(steps) % SAFETY_STEPS :]
    groups = (latest[i : i + SAFETY_STEPS] for i in range(0, len(latest), SAFETY_STEPS))
    ratios = sorted(sum(s.actual_s for s in g) / sum(s.predicted_s for s in g) for g in groups)
    return _quantile(ratios, SAFETY_QUANTILE)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours; numpy's takes longer than all else of a refit."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


class _Seen(NamedTuple):
    """One of a regime's latest steps."""

    features: NDArray[np.float64]
    seconds: float
    ended_s: float
    log_drift_before: float


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
        self._changes = ChangeDetector()
        self._latest: deque[_Seen] = deque(maxlen=NUM_EVIDENCE)
        self._num_to_confirm = 0
        self._ahead = 0.0
        """Of the other's drift, where its speed is a guess."""

    @property
    def is_guess(self) -> bool:
        """Whether its speed is the other regime's, and its own steps have not confirmed it."""
        return self._num_to_confirm > 0

    @property
    def _only_follows(self) -> bool:
        return self._num_to_confirm == NUM_EVIDENCE

    def num_steps_since(self, since_s: float) -> int:
        """Its steps that ended since then, as far as it remembers."""
        return sum(step.ended_s >= since_s for step in self._latest)

    def _forget(self) -> None:
        """Unlearn all but the calibration."""
        self._matrix = np.zeros_like(self._anchor_matrix)
        self._vector = np.zeros_like(self._anchor_vector)
        self.log_drift = 0.0

    def observe(
        self, shape: StepShape, seconds: float, ratio: float, ended_s: float
    ) -> Change | None:
        """Learn from a step; returns the change of speed that it completes.

        Args:
            shape: what ran.
            seconds: how long.
            ratio: actual over predicted seconds.
            ended_s: when it was over.
        """
        features, level = np.array(shape.features), self.log_drift
        clipped_s = seconds / ratio * min(max(ratio, 1 / MAX_RATIO), MAX_RATIO)
        idle_s = ended_s - self._latest[-1].ended_s if self._latest else 0.0
        faded = min(1.0 - math.exp(-max(idle_s, 0.0) / FADE_S), MOST_FADED)
        self._latest.append(_Seen(features, seconds, ended_s, level))
        self._add(features, clipped_s, max(FORGET_SHARE, faded))
        error = math.log(clipped_s / self._anchor_s(features)) - level
        self.log_drift += max(DRIFT_SHARE, faded) * error
        self._changed = True
        self._num_to_confirm = max(0, self._num_to_confirm - 1)
        return self._changes.observe(math.log(ratio), ended_s, level)

    def _add(self, features: NDArray[np.float64], seconds: float, forgotten: float) -> None:
        weighted = features / seconds
        self._matrix = (1.0 - forgotten) * self._matrix + np.outer(weighted, weighted)
        self._vector = (1.0 - forgotten) * self._vector + weighted

    def _anchor_s(self, features: NDArray[np.float64]) -> float:
        return max(float(features @ self._anchor_line), 1e-9)

    def start_again(self, change: Change) -> None:
        """Start from the calibration, at the speed that the latest steps show."""
        evidence = list(self._latest)[-change.num_steps :]
        self._forget()
        self.log_drift = statistics.median(
            math.log(step.seconds / self._anchor_s(step.features)) for step in evidence
        )
        for step in evidence:
            self._add(step.features, step.seconds, FORGET_SHARE)
        self._restart(0)

    def follow(self, level: float, since_s: float) -> None:
        """Start again, from now on at the other regime's speed (``keep_up``).

        Args:
            level: the other's drift before it changed.
            since_s: when it did; what this one took for its own speed since then is forgotten.
        """
        if self._only_follows:
            return
        later = [step for step in self._latest if step.ended_s >= since_s]
        log_drift = later[0].log_drift_before if later else self.log_drift
        self._forget()
        self._ahead = log_drift - level
        self._restart(NUM_EVIDENCE)

    def keep_up(self, level: float) -> None:
        """Go with the other regime's drift, for as long as no step of its own has come."""
        if self._only_follows:
            self.log_drift = level + self._ahead
            self._changed = True

    def _restart(self, num_to_confirm: int) -> None:
        self._changed, self._num_to_confirm = True, num_to_confirm
        self._changes.restart()

    def solve(self) -> Line:
        """The line that fits best now; where there is none the last good one, and a new start."""
        if self._changed:
            speed = math.exp(self.log_drift)
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
