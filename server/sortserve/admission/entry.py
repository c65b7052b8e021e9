"""When a request could enter the batch: slots, KV pages, and who goes before (pure, no torch).

The queue is played through. Everybody who runs gets on at the pace predicted for now, and the
reading of a prompt holds up all others, so there are two clocks: one that counts the tokens' time
and one that counts the prompts' time as well. Who enters holds a slot and pages, more and more of
them, until the last token. As in the scheduler nobody enters before whoever is next in the order,
and each who runs keeps a block to spare.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sortserve.core.slabs import Slabs
from sortserve.scheduling.demand import SOFT_GAP_S, Demand, StepCosts
from sortserve.scheduling.policy import Policy

__all__ = ["UNLIMITED", "Course", "Entry", "Room", "Stay", "course_of", "entry_of", "foresee"]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What requests take up while they run."""

    num_slots: int
    """Most that run at once."""
    num_pages: int
    """Of the KV cache."""
    num_free_pages: int
    """Now, cached ones included."""
    block_size: int
    """Tokens of a page."""
    slabs: Slabs
    """What a page holds."""

    def pages(self, num_tokens: int, exit_layer: int) -> int:
        """Those that hold so many tokens at an exit."""
        return -(-num_tokens // self.block_size) * self.slabs.count(exit_layer)

    def is_ample(self, num_requests: int, num_tokens: int, exit_layer: int) -> bool:
        """Whether so many requests could all run now, and grow to so many tokens together.

        Args:
            num_requests: running and waiting ones.
            num_tokens: of all of them, at their ends.
            exit_layer: the deepest.
        """
        num_blocks = num_tokens // self.block_size + 2 * num_requests
        return (
            num_requests <= self.num_slots
            and num_blocks * self.slabs.count(exit_layer) <= self.num_pages
        )


UNLIMITED = Room(
    num_slots=1 << 60, num_pages=1 << 60, num_free_pages=1 << 60, block_size=1, slabs=Slabs(1)
)


class Stay(NamedTuple):
    """What one request takes of the room, and for how long."""

    request_id: str
    pages: int
    """That it holds when it enters, or now."""
    last_pages: int
    """That it holds at its end."""
    block_pages: int
    """Of one block of tokens."""
    work_s: float
    """Its prompt, during which nobody else gets a token."""
    lasts_s: float
    """From there to its last token, at its pace."""
    is_promised: bool


@dataclass(frozen=True)
class Course:
    """What becomes of the queue, in seconds from now."""

    start_s: dict[str, float]
    """When each that waits can begin with its prompt."""
    over_s: dict[str, float]
    """When each is over, running ones included."""
    crowded_s: float
    """When those with promises no longer fit the pages, so that one of them must give up its own;
    infinite if they always do."""


@dataclass(frozen=True)
class Entry:
    """When a newcomer gets a slot and pages, and what that does to others."""

    start_s: float
    """Seconds from now until it can begin; 0 where there are slots and pages for all."""
    beside: Sequence[Demand]
    """Those of the others who will not be over by then."""
    keeps_others: bool
    """Nobody else's promise is broken by its slot and its pages."""


def entry_of(
    newcomer: Demand,
    others: Sequence[Demand],
    room: Room,
    costs: StepCosts,
    policy: Policy,
    paces: Mapping[int, float],
    *,
    now: float,
) -> Entry:
    """The entry of a newcomer beside others; see ``course_of``."""
    course = course_of([*others, newcomer], room, costs, policy, paces)
    start_s = course.start_s[newcomer.request_id]
    late = _late_starts(others, course, costs, now)
    if late:
        late -= _late_starts(others, course_of(others, room, costs, policy, paces), costs, now)
    return Entry(
        start_s=start_s,
        beside=[d for d in others if course.over_s[d.request_id] > start_s],
        keeps_others=not late and course.crowded_s >= course.over_s[newcomer.request_id],
    )


def _late_starts(
    demands: Sequence[Demand], course: Course, costs: StepCosts, now: float
) -> set[str]:
    """The promised prompts that would wait too long for a slot or for pages."""
    return {
        d.request_id
        for d in demands
        if d.is_waiting
        and d.is_hard
        and now + course.start_s[d.request_id] + d.work_s(costs) > d.due_s
    }


def course_of(
    demands: Sequence[Demand],
    room: Room,
    costs: StepCosts,
    policy: Policy,
    paces: Mapping[int, float],
) -> Course:
    """What becomes of live requests.

    Args:
        demands: of all of them, those that wait in the order in which they are queued.
        room: for all of them.
        costs: of steps.
        policy: whose order of entry counts.
        paces: the time of a token, by exit; of an exit that is not among them the longest.
    """
    slowest = max(paces.values(), default=0.0)

    def stay(demand: Demand) -> Stay:
        num_tokens, exit_layer = demand.context_len + demand.num_pending, demand.exit_layer
        pace_s = paces.get(exit_layer, slowest)
        if demand.is_promised:
            pace_s = min(pace_s, demand.gap_s)
        return Stay(
            request_id=demand.request_id,
            pages=room.pages(num_tokens, exit_layer),
            last_pages=room.pages(num_tokens + demand.num_left, exit_layer),
            block_pages=room.pages(1, exit_layer),
            work_s=0.0 if demand.is_decoding else demand.work_s(costs),
            lasts_s=demand.num_left * pace_s,
            is_promised=demand.is_promised,
        )

    waiting = [demand for demand in demands if demand.is_waiting]
    softs: list[Demand] = []
    if policy.entry_order is not None:
        softs = sorted((d for d in waiting if not d.is_hard), key=lambda d: d.order)
        waiting = [d for d in policy.entry_order(waiting, costs) if d.is_hard]
    return foresee(
        map(stay, (demand for demand in demands if not demand.is_waiting)),
        list(map(stay, waiting)),
        list(map(stay, softs)),
        room,
    )


def foresee(
    running: Iterable[Stay], first: Sequence[Stay], last: Sequence[Stay], room: Room
) -> Course:
    """Play the queue through.

    Args:
        running: in any order.
        first: waiting requests in the order in which they enter.
        last: those that enter after them in their own order; but one in ``SOFT_GAP_S`` goes first.
        room: for all of them.
    """
    return _Play(running, first, last, room).run()


class _Play:
    def __init__(
        self, running: Iterable[Stay], first: Sequence[Stay], last: Sequence[Stay], room: Room
    ) -> None:
        self._room = room
        self._first, self._last = deque(first), deque(last)
        self._tokens_s = 0.0
        self._prompts_s = 0.0
        self._ends: list[tuple[float, int, float, Stay]] = []
        """Of those that run, soonest first: when by the tokens' clock, and when they entered."""
        self._num_entered = 0
        self._spare = 0
        self._held, self._promised = _Growing(), _Growing()
        self._last_entered_s = -math.inf
        self._start_s: dict[str, float] = {}
        self._over_s: dict[str, float] = {}
        self._crowded_s = math.inf
        own = 0
        for stay in running:
            self._enter(stay)
            own += stay.pages
        # Pages that several share are held once.
        self._held.base += room.num_pages - room.num_free_pages - own

    @property
    def _now_s(self) -> float:
        return self._tokens_s + self._prompts_s

    def run(self) -> Course:
        while self._first or self._last:
            has_turn = self._now_s - self._last_entered_s >= SOFT_GAP_S
            is_last = bool(self._last) and (has_turn or not self._first)
            queue = self._last if is_last else self._first
            if not self._fits(queue[0]):
                self._end_one()
                continue
            self._start_s[queue[0].request_id] = self._now_s
            if is_last:
                self._last_entered_s = self._now_s
            self._enter(queue.popleft())
        while self._ends:
            self._end_one()
        return Course(self._start_s, self._over_s, self._crowded_s)

    def _fits(self, stay: Stay) -> bool:
        if not self._ends:
            return True
        num_free = self._room.num_pages - max(0.0, self._held.at(self._tokens_s))
        return (
            len(self._ends) < self._room.num_slots and stay.pages + self._spare <= num_free + 1e-6
        )

    def _enter(self, stay: Stay) -> None:
        now_s = self._tokens_s
        self._prompts_s += stay.work_s
        self._num_entered += 1
        heapq.heappush(self._ends, (now_s + stay.lasts_s, self._num_entered, now_s, stay))
        self._spare += stay.block_pages
        self._held.add(stay, now_s)
        if stay.is_promised:
            self._promised.add(stay, now_s)
            self._look_for_a_crowd()

    def _end_one(self) -> None:
        """Let the time pass until the next one is over."""
        ends_s, _, entered_s, stay = heapq.heappop(self._ends)
        self._tokens_s = ends_s
        self._look_for_a_crowd()
        self._over_s[stay.request_id] = self._now_s
        self._spare -= stay.block_pages
        self._held.remove(stay, entered_s)
        if stay.is_promised:
            self._promised.remove(stay, entered_s)

    def _look_for_a_crowd(self) -> None:
        if self._promised.at(self._tokens_s) > self._room.num_pages + 1e-6:
            self._crowded_s = min(self._crowded_s, self._now_s)


class _Growing:
    """Pages held by some requests, each growing evenly from its first to its last."""

    def __init__(self) -> None:
        self.base = 0.0
        self._rate = 0.0

    def at(self, now_s: float) -> float:
        return self.base + self._rate * now_s

    def add(self, stay: Stay, entered_s: float, sign: int = 1) -> None:
        rate = (stay.last_pages - stay.pages) / max(stay.lasts_s, 1e-9)
        self.base += sign * (stay.pages - rate * entered_s)
        self._rate += sign * rate

    def remove(self, stay: Stay, entered_s: float) -> None:
        self.add(stay, entered_s, -1)
