"""Has the machine changed its speed at once? Asked of each step: soon seen, seldom in vain.

Two cumulative sums (Page, 1954), one for steps that take longer than predicted and one for those
that take less. Each step adds what it is off by, less what noise and a wrong shape explain, so the
sums of steps that are off to either side stay near zero, and those of a changed machine grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Change", "ChangeDetector"]

SLACK = 0.25
"""What a step may be off by, as a logarithm of actual over predicted, and says nothing."""
MOST = math.log(2.0)
"""A step that is further off counts as this: one that was held up proves no change."""
ALARM = 1.2
"""The sum that counts as a change: three steps at twice their time, eight at half as much again."""
CAP = 1.7
"""No sum is more, so that a stretch which is over is soon forgotten."""
MIN_STEPS = 3
MIN_SECONDS = 2.0
"""From the first of them to the last: a slow stretch is no change ..."""
MANY_STEPS = 32
"""... unless it lasts for so many."""


class Change(NamedTuple):
    """What a detector has seen."""

    num_steps: int
    """Steps that show it."""
    since_s: float
    """When the first of them ended."""
    level: float
    """What its caller reckoned with before it."""


@dataclass
class _Side:
    total: float = 0.0
    num_steps: int = 0
    since_s: float = 0.0
    level: float = 0.0

    def add(self, excess: float, ended_s: float, level: float) -> bool:
        """Whether it is a change, with one more step."""
        self.total = min(self.total + min(excess, MOST) - SLACK, CAP)
        if self.total <= 0.0:
            self.total, self.num_steps = 0.0, 0
            return False
        if self.num_steps == 0:
            self.since_s, self.level = ended_s, level
        self.num_steps += 1
        lasts = ended_s - self.since_s >= MIN_SECONDS or self.num_steps >= MANY_STEPS
        return lasts and self.num_steps >= MIN_STEPS and self.total >= ALARM


class ChangeDetector:
    """The two sums over the steps of one kind."""

    def __init__(self) -> None:
        self._sides = (_Side(), _Side())

    def restart(self) -> None:
        """Forget all steps: the prediction is another one now."""
        self._sides = (_Side(), _Side())

    def observe(self, error: float, ended_s: float, level: float) -> Change | None:
        """Look at one step.

        Args:
            error: logarithm of actual over predicted seconds.
            ended_s: when it ended, on a clock that never goes back.
            level: what the caller reckoned with, to be told of a change.
        """
        slow, fast = self._sides
        is_slower, is_faster = slow.add(error, ended_s, level), fast.add(-error, ended_s, level)
        if not (is_slower or is_faster):
            return None
        side = slow if is_slower else fast
        return Change(side.num_steps, side.since_s, side.level)
