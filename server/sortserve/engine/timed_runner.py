"""A runner without a model, and a clock that its steps move: what simulations run (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sortserve.core.plan import Runner, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.core.slabs import Slabs
from sortserve.cost.machine import Machine
from sortserve.cost.model import CostModel, step_shape

__all__ = ["BLANK", "BlankRunner", "Clock", "TimedRunner"]

BLANK = 1
"""The id of every token, read or generated."""


@dataclass
class Clock:
    """A clock that moves only when told."""

    now: float = 0.0

    def __call__(self) -> float:
        """The present moment."""
        return self.now


class BlankRunner:
    """Runs nothing, and every token is blank."""

    block_size = 16

    def __init__(self, exits: Sequence[int], *, num_pages: int) -> None:
        self.num_pages = num_pages
        self.slabs = Slabs.of(exits)

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """A token for each row that samples."""
        return [SampledToken(BLANK) for row in plan.rows if row.sampling is not None]


class TimedRunner:
    """A runner whose steps take the time that somebody says, times some noise."""

    def __init__(
        self,
        runner: Runner,
        clock: Clock,
        truth: Machine | CostModel,
        *,
        noise: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.num_pages, self.block_size = runner.num_pages, runner.block_size
        self.slabs = runner.slabs
        self._runner, self._clock, self._truth, self._noise = runner, clock, truth, noise

    def execute(self, plan: StepPlan) -> Sequence[SampledToken | RowFailure]:
        """Let the step's time pass, and run it."""
        self._clock.now += self._truth.step_s(step_shape(plan)) * self._noise()
        return self._runner.execute(plan)
