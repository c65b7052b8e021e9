"""A replica's full batch, seen from afar: whether one more would fit (pure, no torch, no clock).

Admission there tries two courses, and so does a router (``Place``): paces, and the one in which
each step runs everybody (``sortserve.scheduling.full_batch``). Of that a report tells the least
time that an answer can spare, and when how many steps are over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sortserve.replicas.load import EngineLoad

__all__ = ["FullBatch", "OneMore"]


@dataclass(frozen=True, slots=True)
class OneMore:
    """A request that would take part."""

    reading_s: float
    """By how much its prompt makes steps longer."""
    row_s: float
    step_s: float
    """Of a step to its exit, without rows."""
    num_steps: int
    """Its tokens."""
    end_s: float
    """When it should be over, from now."""


@dataclass
class FullBatch:
    """The course of one replica, and what was sent there since its report."""

    spare_s: float
    """The least of its answers."""
    busy_s: float
    """What it still does for no request."""
    points: Sequence[tuple[float, float]]
    """Steps, and seconds that they take; after none, what prompts add to them. Both ascending."""
    deepest_s: float
    """A step to its deepest row, without rows."""

    @classmethod
    def of(cls, load: EngineLoad, slack: float) -> FullBatch:
        """The course that a report tells.

        Args:
            load: the report.
            slack: the share of the spare time that a report of its age is still believed.
        """
        deepest = (e.step_ms for e in load.exits if e.exit_layer == load.full_batch_layer)
        return cls(
            spare_s=math.inf if load.spare_ms is None else 1e-3 * load.spare_ms * slack,
            busy_s=1e-3 * load.busy_ms,
            points=[(num_steps, 1e-3 * ms) for num_steps, ms in load.full_batch],
            deepest_s=1e-3 * next(deepest, 0.0),
        )

    def fits(self, one: OneMore) -> bool:
        """Whether all answers are over in time with one more; of nothing known, none are."""
        return bool(self.points) and self._spare_with_s(one) >= 0.0

    def add(self, one: OneMore) -> None:
        """One more is on its way there."""
        if not self.points:
            return
        self.spare_s = self._spare_with_s(one)
        more_s = self._more_s(one)
        self.points = [(n, at + one.reading_s + n * more_s) for n, at in self.points]
        self.deepest_s = max(self.deepest_s, one.step_s)

    def first_step_s(self, one: OneMore) -> float:
        """The first step with one more, beside all prompts."""
        alone_s = self.at_s(1) - self.at_s(0)
        return alone_s + self._more_s(one)

    def _spare_with_s(self, one: OneMore) -> float:
        """The least that an answer can spare, that of one more included."""
        return min(self.spare_s - self._delay_s(one), self._own_spare_s(one))

    def _delay_s(self, one: OneMore) -> float:
        """By how much the answers there are later."""
        num_shared = min(one.num_steps, self.points[-1][0])
        return one.reading_s + num_shared * self._more_s(one)

    def _more_s(self, one: OneMore) -> float:
        return one.row_s + max(0.0, one.step_s - self.deepest_s)

    def _own_spare_s(self, one: OneMore) -> float:
        """What it can spare itself."""
        num_shared = min(one.num_steps, self.points[-1][0])
        over_s = self.busy_s + one.reading_s + self.at_s(num_shared)
        over_s += num_shared * self._more_s(one)
        over_s += (one.num_steps - num_shared) * (one.step_s + one.row_s)
        return one.end_s - over_s

    def at_s(self, num_steps: float) -> float:
        """Seconds until so many steps are over, on the line between two points, or at the end."""
        low = max((p for p in self.points if p[0] <= num_steps), default=self.points[0])
        high = min((p for p in self.points if p[0] >= num_steps), default=self.points[-1])
        share = (num_steps - low[0]) / max(high[0] - low[0], 1e-9)
        return low[1] + share * (high[1] - low[1])
