"""When a request could enter the batch, and what that does to others (pure, no torch).

The queue is played through (``play``) with the newcomer in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sortserve.admission.play import Course, Stay, Stays, foresee, stays_of
from sortserve.admission.room import Room
from sortserve.scheduling.columns import Columns, Mask
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.policy import Policy

__all__ = ["Entry", "Queue", "course_of", "entry_of"]


@dataclass(frozen=True)
class Entry:
    """When a newcomer gets a slot and pages, and what that does to others."""

    start_s: float
    """Seconds from now until it can begin; 0 where there are slots and pages for all."""
    beside: Mask | None
    """[n] those of the others who will not be over by then; None: all of them."""
    keeps_others: bool
    """Nobody else's promise is broken by its slot and its pages."""


@dataclass(frozen=True, eq=False)
class Queue:
    """Live requests as far as newcomers wait for them; what all plays share is worked out once."""

    demands: Sequence[Demand]
    """Those that wait in the order in which they are queued."""
    columns: Columns
    """The same."""
    room: Room
    """For all of them."""
    costs: StepCosts
    policy: Policy
    """Whose order of entry counts."""
    paces: Mapping[int, float]
    """The time of a token, by exit; of an exit that is not among them the longest."""

    @cached_property
    def _stays(self) -> Stays:
        return stays_of(self.demands, self.columns, self.room, self.costs, self.paces)

    @cached_property
    def running(self) -> Stays:
        """Those that run."""
        return self._stays.rows(~self.columns.is_waiting)

    @cached_property
    def waiting(self) -> list[Demand]:
        """The others."""
        return [self.demands[i] for i in np.flatnonzero(self.columns.is_waiting).tolist()]

    @cached_property
    def waiting_stays(self) -> dict[str, Stay]:
        """What they will take."""
        rows = np.flatnonzero(self.columns.is_waiting).tolist()
        return {self.demands[i].request_id: self._stays[i] for i in rows}

    @cached_property
    def latest_s(self) -> dict[str, float]:
        """When each promised prompt must begin at the latest, on the engine's clock."""
        return {d.request_id: d.due_s - d.work_s(self.costs) for d in self.waiting if d.is_hard}

    def late(self, course: Course, now: float) -> set[str]:
        """The promised prompts that would wait too long for a slot or for pages."""
        start_s = course.start_s
        return {name for name, latest_s in self.latest_s.items() if now + start_s[name] > latest_s}

    def stay_of(self, newcomer: Demand) -> Stay:
        """What somebody else would take, who has nothing yet."""
        exit_layer = newcomer.exit_layer
        num_tokens = newcomer.context_len + newcomer.num_pending
        pace_s = self.paces.get(exit_layer, max(self.paces.values(), default=0.0))
        return Stay(
            request_id=newcomer.request_id,
            pages=self.room.pages(num_tokens, exit_layer),
            last_pages=self.room.pages(num_tokens + newcomer.num_left, exit_layer),
            block_pages=self.room.pages(1, exit_layer),
            work_s=newcomer.work_s(self.costs),
            lasts_s=newcomer.num_left
            * (min(pace_s, newcomer.gap_s) if newcomer.is_promised else pace_s),
            is_promised=newcomer.is_promised,
        )


def entry_of(newcomer: Demand, queue: Queue, *, now: float) -> Entry:
    """The entry of a newcomer, who comes last."""
    course = course_of(queue, newcomer)
    start_s = course.start_s[newcomer.request_id]
    late = queue.late(course, now)
    if late:
        late -= queue.late(course_of(queue), now)
    over_s = np.array([course.over_s[demand.request_id] for demand in queue.demands])
    return Entry(
        start_s=start_s,
        beside=over_s > start_s,
        keeps_others=not late and course.crowded_s >= course.over_s[newcomer.request_id],
    )


def course_of(queue: Queue, newcomer: Demand | None = None) -> Course:
    """What becomes of live requests, and of a newcomer if there is one."""
    waiting, stays = queue.waiting, queue.waiting_stays
    if newcomer is not None:
        waiting = [*waiting, newcomer]
        stays = {**stays, newcomer.request_id: queue.stay_of(newcomer)}
    softs: list[Demand] = []
    order = queue.policy.entry_order
    if order is not None:
        softs = sorted((d for d in waiting if not d.is_hard), key=lambda d: d.order)
        waiting = [d for d in order(waiting, queue.costs) if d.is_hard]
    first, last = ([stays[d.request_id] for d in demands] for demands in (waiting, softs))
    return foresee(queue.running, first, last, queue.room)
