"""What a newcomer would meet: the load, and what all forecasts of one decision share (no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sortserve.admission.at_risk import AtRisk
from sortserve.admission.entry import Queue
from sortserve.admission.offered import NOTHING_OFFERED, OfferedLoad
from sortserve.admission.room import UNLIMITED, Room
from sortserve.core.budget import Deadlines
from sortserve.core.schedule import DepthSchedule, mean_over_tokens
from sortserve.cost.model import CostModel, StepShape
from sortserve.scheduling.columns import Columns, Floats, Mask
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.demand_table import DemandTable
from sortserve.scheduling.full_batch import Course, course
from sortserve.scheduling.lowering import Times
from sortserve.scheduling.policy import MOST_STEPS, Policy

__all__ = ["Load", "Newcomer", "Outlook"]

MAX_BUSY_SHARE = 0.95
"""Times of a newcomer are stretched for the promises before it, at most twentyfold."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The engine's state as far as a newcomer's times depend on it."""

    now: float
    demands: Sequence[Demand] = ()
    """Of all live requests, those that the engine has not yet taken included."""
    columns: Columns | None = None
    """The same as columns, where somebody has made them already."""
    seen_s: float | None = None
    """When this is what they needed: nothing of what the engine has done since has been taken off.
    None: now."""
    policy: Policy
    max_num_batched_tokens: int = 1024
    room: Room = UNLIMITED
    """Slots and pages for all of them."""
    busy_until_s: float = -math.inf
    """When what the engine does for no request should be over."""
    offered: OfferedLoad = NOTHING_OFFERED
    """What comes in lately."""
    worth: Mapping[int, float] = field(default_factory=dict)
    """Of a token at each exit, by the objective; an exit that is missing counts its layers."""

    def with_demands(self, demands: Sequence[Demand], columns: Columns | None = None) -> Load:
        """The same, if these were the live requests."""
        return replace(self, demands=demands, columns=columns)


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
    schedule: DepthSchedule | None = None
    num_scored: int = 0
    """As a ``Demand`` has it."""
    cached: Mapping[int, int] = field(default_factory=dict)
    """Leading tokens of its prompt that the prefix cache holds, by exit; none where it has none."""
    may_be_refused: bool = True
    """Else it is answered in any case, late if need be."""
    num_siblings: int = 0
    """So many others like it come with it, and the load knows nothing of them."""

    def reading(self, exit_layer: int) -> tuple[int, int]:
        """Tokens of its prompt to be read at an exit, and those before them, which need not be."""
        num_read = self.cached.get(exit_layer, 0)
        return self.num_prompt_tokens - num_read, num_read

    def reading_s(self, exit_layer: int, costs: StepCosts) -> float:
        """By how much its prompt makes the steps longer in which it is read."""
        alone_s = costs.prefill_s(exit_layer, *self.reading(exit_layer), self.num_scored)
        return max(0.0, alone_s - costs.base_s(exit_layer))

    def mean(self, value: Callable[[int], float], exit_layer: int) -> float:
        """The mean over its tokens after the first, if it starts at an exit."""
        return mean_over_tokens(value, exit_layer, self.schedule, self.num_output_tokens, start=1)

    @property
    def bounds_time(self) -> bool:
        """Whether it wants anything of a time."""
        return self.deadlines != Deadlines()


class Prompts(NamedTuple):
    """Prompts that are not read yet."""

    work_s: Floats
    """Predicted seconds of each, alone."""
    is_hard: Mask
    due_s: Floats


@dataclass(frozen=True)
class Outlook:
    """A load seen with a cost model: what all forecasts of one decision share."""

    load: Load
    model: CostModel
    also: tuple[int, ...] = ()
    """Exits that are asked about, and need not have rows."""
    _parts: dict[bytes, Outlook] = field(default_factory=dict, init=False, compare=False)

    def at(self, load: Load, model: CostModel, also: tuple[int, ...]) -> Outlook:
        """The outlook on another load; of the same demands, only what depends on the time is new.

        Many requests are judged between two steps, and what all of them meet is the same.
        """
        other = Outlook(load, model, also)
        mine = self.load
        is_same = (
            load.columns is not None
            and (load.columns is mine.columns and load.demands is mine.demands)
            and (model is self.model and load.worth is mine.worth)
            and load.max_num_batched_tokens == mine.max_num_batched_tokens
            and (load.room is mine.room and load.policy is mine.policy)
            and set(also) <= set(self.exits)
        )
        if is_same:
            known = vars(self)
            vars(other).update({name: known[name] for name in _TIMELESS & known.keys()})
        return other

    @cached_property
    def columns(self) -> Columns:
        """What all live requests need."""
        return self.load.columns or Columns.of(self.load.demands)

    @cached_property
    def costs(self) -> StepCosts:
        """Of the steps that a newcomer would take part in, with the safety factor."""
        return StepCosts(
            self.model,
            num_rows=int(np.count_nonzero(self.columns.is_decoding)) + 1,
            chunk=self.load.max_num_batched_tokens,
            safety=self.model.safety,
        )

    @cached_property
    def exits(self) -> tuple[int, ...]:
        """All exits that matter, ascending."""
        known = {*self.load.worth, *self.also}
        used = np.concatenate((self.columns.exit_layer, self.columns.floor_layer))
        return tuple(sorted(known.union(np.bincount(used.astype(np.intp)).nonzero()[0].tolist())))

    @cached_property
    def worth(self) -> Floats:
        """Of a token at each exit."""
        return np.array([self.load.worth.get(e, float(e)) for e in self.exits])

    @cached_property
    def table(self) -> DemandTable:
        """All live requests, beside what they cost."""
        return DemandTable.of(self.columns, self.costs, self.exits)

    def later_loss(self, table: DemandTable, found: Course) -> float:
        """What those who come later are expected to lose if these were the live requests.

        Args:
            table: of them.
            found: their full batch.
        """
        now = self.load.now
        spare_s = found.spare_s(table, now=now, busy_s=self.ahead_s)
        return self.load.offered.loss(table.end_s, spare_s, now)

    @cached_property
    def full_batch(self) -> Course:
        """What a full batch of all of them would do."""
        return course(self.table, self.table.level)

    @cached_property
    def any_ends(self) -> bool:
        """Whether any live answer was promised to be over by a time."""
        return bool(np.isfinite(self.table.end_s).any())

    @cached_property
    def loss_so_far(self) -> float:
        """What they lose beside the present ones."""
        return self.later_loss(self.table, self.full_batch)

    @property
    def busy_s(self) -> float:
        """What the step under way still takes."""
        if self.any_rows:
            return self.half_step_s
        return max(0.0, self.load.busy_until_s - self.load.now)

    @cached_property
    def at_risk(self) -> AtRisk | None:
        """Promises that cannot be kept as things are; None: there are none."""
        return AtRisk.of(self.table, self.full_batch, self.pacing, self.batching)

    @property
    def pacing(self) -> Times:
        """When pacing begins: a step under way is no part of it."""
        return Times(now=self.load.now, busy_s=self.busy_s)

    @property
    def batching(self) -> Times:
        """When a full batch begins: that step is its first."""
        return Times(now=self.load.now, busy_s=self.ahead_s)

    @property
    def ahead_s(self) -> float:
        """Seconds until the machine can begin with what the live requests need.

        Below 0 while it runs: what they need is looked at before each step, and nothing of that
        step, nor of the next one until that is chosen, has been taken off. No longer ago than two
        of the longest steps beside rows take, whatever held them up.
        """
        if not self.any_rows:
            return self.busy_s
        now, seen_s = self.load.now, self.load.seen_s
        since_s = 0.0 if seen_s is None else now - seen_s
        return -min(since_s, 4.0 * (1.0 + MOST_STEPS) * self.half_step_s)

    @cached_property
    def half_step_s(self) -> float:
        """What a step still takes, in the mean, while it is under way."""
        columns, costs = self.columns, self.costs
        runs = ~columns.is_waiting
        if not runs.any():
            return 0.0
        decode = runs & columns.is_decoding
        depth = columns.exit_layer[decode]
        row_s, (token_s, context_s) = costs.row_line
        rows = row_s * len(depth) + depth @ (token_s + context_s * columns.context_len[decode])
        return (costs.base_s(int(columns.exit_layer[runs].max())) + float(rows)) / 2

    @cached_property
    def most_tokens(self) -> int:
        """What all live requests together hold at their ends."""
        known = self.columns.context_len.sum() + self.columns.num_pending.sum()
        return int(known + self.columns.num_left.sum())

    @cached_property
    def prompts(self) -> Prompts:
        """What is not read yet."""
        columns, table = self.columns, self.table
        at = np.flatnonzero(~columns.is_decoding)
        work_s = table.work_s[at] + columns.exit_layer[at] * table.work_layer_s[at]
        return Prompts(work_s, columns.is_hard[at], columns.due_s[at])

    @cached_property
    def any_rows(self) -> bool:
        """Whether anything runs."""
        return not self.columns.is_waiting.all()

    @cached_property
    def any_soft(self) -> bool:
        """Whether somebody runs who was promised nothing."""
        return bool((~self.columns.is_waiting & ~self.columns.is_promised).any())

    @cached_property
    def hard_share(self) -> float:
        """The share of the machine that promised rows take by decoding."""
        hard = self.columns.is_decoding & self.columns.is_promised
        return min(self.table.decode_share(hard), MAX_BUSY_SHARE)

    @cached_property
    def rows_by_exit(self) -> dict[int, tuple[int, int]]:
        """How many rows run at each exit, and the tokens that they have cached."""
        runs = np.flatnonzero(~self.columns.is_waiting)
        level, size = self.table.level[runs], len(self.exits)
        counts = np.bincount(level, minlength=size)
        tokens = np.bincount(level, self.columns.context_len[runs], minlength=size)
        return {
            e: (int(n), int(t)) for e, n, t in zip(self.exits, counts, tokens, strict=True) if n
        }

    @cached_property
    def paces(self) -> dict[int, float]:
        """The time of a token of those who run, or are about to, by exit.

        Who waits for their slots is no row.
        """
        columns = self.columns
        entered = ~columns.is_waiting
        if not entered.any():
            entered = np.arange(len(entered)) < self.load.room.num_slots
        at = np.flatnonzero(entered)
        level, size = self.table.level[at], len(self.exits)
        held = columns.context_len + columns.num_pending + columns.num_left // 2
        counts, tokens = np.bincount(level, minlength=size), np.bincount(level, held[at], size)
        rows = {
            e: (int(n), int(t)) for e, n, t in zip(self.exits, counts, tokens, strict=True) if n
        }
        return self.paces_of(rows, any_soft=bool((~columns.is_promised[at]).any()))

    def paces_of(self, rows: Mapping[int, tuple[int, int]], *, any_soft: bool) -> dict[int, float]:
        """The time of a token by exit, if so many rows with so many tokens were at each.

        Args:
            rows: by exit, their number and the tokens of their contexts.
            any_soft: whether anybody was promised nothing.
        """
        policy, costs = self.load.policy, self.costs
        seconds, num_rows, layer_tokens, layer_kv_tokens = {}, 0, 0, 0
        for cap in sorted(rows):
            count, tokens = rows[cap]
            num_rows, layer_tokens = num_rows + count, layer_tokens + cap * count
            layer_kv_tokens += cap * tokens
            shape = StepShape(cap, num_rows, layer_tokens, layer_kv_tokens, num_rows)
            seconds[cap] = costs.model.step_s(shape) * costs.safety
        if policy.keeps_promises and not any_soft:
            # A step is as deep as it can be while all are in time.
            return dict.fromkeys(seconds, max(seconds.values(), default=0.0))
        return {e: 1.0 / rate for e, rate in policy.rates(seconds).items()} if seconds else {}

    @cached_property
    def queue(self) -> Queue:
        """What newcomers wait for."""
        load = self.load
        return Queue(load.demands, self.columns, load.room, self.costs, load.policy, self.paces)

    def of_those(self, mask: Mask) -> Outlook:
        """The outlook if only these were live; the same object if asked for the same again."""
        if mask.all():
            return self
        key = mask.tobytes()
        if key not in self._parts:
            demands = [self.load.demands[i] for i in np.flatnonzero(mask).tolist()]
            load = self.load.with_demands(demands, self.columns.rows(mask))
            self._parts[key] = Outlook(load, self.model, self.also)
        return self._parts[key]


_TIMELESS = frozenset(
    name for name, value in vars(Outlook).items() if isinstance(value, cached_property)
) - {"loss_so_far", "at_risk"}
