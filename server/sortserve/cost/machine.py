"""A model on a machine as figures: what its steps cost, and what its exits are (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sortserve.core.budget import ExitInfo, ExitTable
from sortserve.core.schedule import ScheduleInfo
from sortserve.cost.model import CostModel, Line, RowShape, StepShape
from sortserve.cost.step_curve import StepCurve

__all__ = ["Machine"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A model's exits on a machine."""

    name: str
    source: str
    """Where the figures come from."""
    exits: tuple[int, ...]
    small: Line
    """Seconds of a step of few tokens, and of one of many (see ``CostModel``)."""
    large: Line
    compute: Mapping[int, float]
    """Share of the full model's FLOPs per token, by exit."""
    score: Mapping[int, float] | None = None
    """Measured quality, by exit; None: nobody measured."""
    schedules: tuple[ScheduleInfo, ...] = ()
    """Depth schedules that were measured."""
    noise: float = 0.08
    """Standard deviation of the logarithm of a step's time."""
    curve: StepCurve | None = None
    """What steps take in truth, where that was measured; None: what ``model`` says."""
    num_pages: int = 200_000
    """Of the KV cache, of 16 tokens and as many layers as divide all exits."""

    @property
    def model(self) -> CostModel:
        """The times of steps as a scheduler could best know them."""
        return CostModel(self.small, self.large)

    def step_s(self, shape: StepShape) -> float:
        """The true time of a step, without the noise."""
        return self.model.step_s(shape) if self.curve is None else self.curve.step_s(shape)

    @property
    def table(self) -> ExitTable:
        """The exits as the server knows them."""
        return ExitTable(
            tuple(
                ExitInfo(
                    exit_layer=e,
                    num_parameters=e,
                    compute=self.compute[e],
                    score=None if self.score is None else self.score[e],
                )
                for e in self.exits
            ),
            schedules=self.schedules,
        )

    def calibration(self) -> list[tuple[StepShape, float]]:
        """What a server would have measured at its start."""
        shapes = []
        for exit_layer in self.exits:
            for num_rows in (1, 4, 16, 32):
                for context_len in (16, 256):
                    row = RowShape(exit_layer, 1, context_len, samples=True)
                    shapes.append(StepShape.of([row] * num_rows))
            for num_tokens in (64, 128, 256, 512):
                row = RowShape(exit_layer, num_tokens, num_tokens, samples=True)
                shapes.append(StepShape.of([row]))
        return [(shape, self.step_s(shape)) for shape in shapes]
