"""What a newcomer would meet: the load, and what all forecasts of one decision share (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sortserve.core.budget import Deadlines
from sortserve.cost.model import CostModel
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.demand_table import DemandTable, Floats
from sortserve.scheduling.policy import Policy

__all__ = ["Load", "Newcomer", "Outlook"]

MAX_BUSY_SHARE = 0.95
"""Times of a newcomer are stretched for the promises before it, at most twentyfold."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The engine's state as far as a newcomer's times depend on it."""

    now: float
    demands: Sequence[Demand] = ()
    """Of all live requests, those that the engine has not yet taken included."""
    policy: Policy
    max_num_batched_tokens: int = 1024
    worth: Mapping[int, float] = field(default_factory=dict)
    """Of a token at each exit, by the objective; an exit that is missing counts its layers."""


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """A request that asks what it could get."""

    num_prompt_tokens: int
    num_output_tokens: int
    """To plan for."""
    arrival_s: float
    deadlines: Deadlines = field(default_factory=Deadlines)
    floor_layer: int | None = None
    weight: float = 1.0

    @property
    def bounds_time(self) -> bool:
        """Whether it wants anything of a time."""
        return self.deadlines != Deadlines()


@dataclass(frozen=True)
class Outlook:
    """A load seen with a cost model: what all forecasts of one decision share."""

    load: Load
    model: CostModel
    also: tuple[int, ...] = ()
    """Exits that are asked about, and need not have rows."""

    @cached_property
    def costs(self) -> StepCosts:
        """Of the steps that a newcomer would take part in, with the safety factor."""
        num_decoding = sum(d.is_decoding for d in self.load.demands)
        return StepCosts(
            self.model,
            num_rows=num_decoding + 1,
            chunk=self.load.max_num_batched_tokens,
            safety=self.model.safety,
        )

    @cached_property
    def exits(self) -> tuple[int, ...]:
        """All exits that matter, ascending."""
        used = {e for d in self.load.demands for e in (d.exit_layer, d.floor_layer)}
        return tuple(sorted({*self.load.worth, *self.also, *used}))

    @cached_property
    def worth(self) -> Floats:
        """Of a token at each exit."""
        return np.array([self.load.worth.get(e, float(e)) for e in self.exits])

    @cached_property
    def table(self) -> DemandTable:
        """All live requests."""
        return self.columns(self.load.demands)

    def columns(self, demands: Sequence[Demand]) -> DemandTable:
        """Demands as columns that can join the others."""
        return DemandTable.of(demands, self.costs, self.exits)

    @cached_property
    def busy_s(self) -> float:
        """What the step under way still takes, in the mean: half of it."""
        running, costs = self.rows, self.costs
        if not running:
            return 0.0
        deepest = max(d.exit_layer for d in running)
        rows = sum(costs.row_s(d.exit_layer, d.context_len) for d in running if d.is_decoding)
        return (costs.base_s(deepest) + rows) / 2

    @cached_property
    def rows(self) -> list[Demand]:
        """What runs."""
        return [d for d in self.load.demands if not d.is_waiting]

    @cached_property
    def prompts(self) -> list[Demand]:
        """What is not read yet."""
        return [d for d in self.load.demands if not d.is_decoding]

    @cached_property
    def any_soft(self) -> bool:
        """Whether somebody runs who was promised nothing."""
        return any(not d.is_promised for d in self.rows)

    @cached_property
    def hard_share(self) -> float:
        """The share of the machine that promised rows take by decoding."""
        hard = [d for d in self.load.demands if d.is_decoding and d.is_promised]
        if not hard:
            return 0.0
        table = self.columns(hard)
        return min(table.need(table.level, now=self.load.now).share, MAX_BUSY_SHARE)

    @cached_property
    def rows_by_exit(self) -> dict[int, tuple[int, int]]:
        """How many rows run at each exit, and the tokens that they have cached."""
        found: dict[int, tuple[int, int]] = {}
        for d in self.rows:
            count, tokens = found.get(d.exit_layer, (0, 0))
            found[d.exit_layer] = (count + 1, tokens + d.context_len)
        return found
