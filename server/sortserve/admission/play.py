"""The queue played through: who enters when, and when each is over (pure, no torch).

Everybody who runs gets on at the pace predicted for now, and the reading of a prompt holds up all
others, so there are two clocks: one that counts the tokens' time and one that counts the prompts'
time as well. Who enters holds a slot and pages, more and more of them, until the last token. As in
the scheduler nobody enters before whoever is next in the order, and each who runs keeps a block to
spare.

Only while somebody waits are events looked at one by one. Who runs at the beginning comes as
columns, and what is left once all have entered is worked out at a stroke.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sortserve.admission.room import Room
from sortserve.scheduling.columns import Columns, Floats, Mask
from sortserve.scheduling.demand import SOFT_GAP_S, Demand, StepCosts
from sortserve.scheduling.demand_table import reading_lines

__all__ = ["Course", "Stay", "Stays", "foresee", "stays_of"]

_ROUNDING_PAGES = 1e-6


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


@dataclass(frozen=True, eq=False)
class Stays:
    """Many of them, as columns [n] in the order of ``request_ids``."""

    request_ids: Sequence[str]
    pages: Floats
    last_pages: Floats
    block_pages: Floats
    work_s: Floats
    lasts_s: Floats
    is_promised: Mask

    @classmethod
    def of(cls, stays: Iterable[Stay]) -> Stays:
        """The columns of some."""
        rows = list(stays)
        return cls(
            request_ids=[stay.request_id for stay in rows],
            pages=np.array([stay.pages for stay in rows], dtype=np.float64),
            last_pages=np.array([stay.last_pages for stay in rows], dtype=np.float64),
            block_pages=np.array([stay.block_pages for stay in rows], dtype=np.float64),
            work_s=np.array([stay.work_s for stay in rows]),
            lasts_s=np.array([stay.lasts_s for stay in rows]),
            is_promised=np.array([stay.is_promised for stay in rows], dtype=np.bool_),
        )

    def __getitem__(self, row: int) -> Stay:
        return Stay(
            self.request_ids[row],
            int(self.pages[row]),
            int(self.last_pages[row]),
            int(self.block_pages[row]),
            float(self.work_s[row]),
            float(self.lasts_s[row]),
            bool(self.is_promised[row]),
        )

    def rows(self, mask: Mask) -> Stays:
        """Some of them."""
        at = np.flatnonzero(mask)
        ids = [self.request_ids[i] for i in at.tolist()]
        _, *columns = vars(self).values()
        return Stays(ids, *(column[at] for column in columns))


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


def stays_of(
    demands: Sequence[Demand],
    columns: Columns,
    room: Room,
    costs: StepCosts,
    paces: Mapping[int, float],
) -> Stays:
    """What live requests take, at their present exits.

    Args:
        demands: of them.
        columns: the same.
        room: for all of them.
        costs: of steps.
        paces: the time of a token, by exit; of an exit that is not among them the longest.
    """
    exits, where = np.unique(columns.exit_layer, return_inverse=True)
    slowest = max(paces.values(), default=0.0)
    pace_s = np.array([paces.get(int(e), slowest) for e in exits])[where]
    pace_s = np.where(columns.is_promised, np.minimum(pace_s, columns.gap_s), pace_s)
    num_tokens = columns.context_len + columns.num_pending
    block_pages = np.array([room.slabs.count(int(e)) for e in exits], dtype=np.float64)[where]
    at_all, per_layer = reading_lines(columns, costs)
    reading_s = at_all + columns.exit_layer * per_layer
    return Stays(
        request_ids=[demand.request_id for demand in demands],
        pages=np.ceil(num_tokens / room.block_size) * block_pages,
        last_pages=np.ceil((num_tokens + columns.num_left) / room.block_size) * block_pages,
        block_pages=block_pages,
        work_s=reading_s,
        lasts_s=columns.num_left * pace_s,
        is_promised=columns.is_promised,
    )


def foresee(
    running: Stays | Iterable[Stay], first: Sequence[Stay], last: Sequence[Stay], room: Room
) -> Course:
    """Play the queue through.

    Args:
        running: in any order.
        first: waiting requests in the order in which they enter.
        last: those that enter after them in their own order; but one in ``SOFT_GAP_S`` goes first.
        room: for all of them.
    """
    running = running if isinstance(running, Stays) else Stays.of(running)
    return _Play(running, first, last, room).run()


class _Play:
    """Requests have numbers, in the order in which they entered."""

    def __init__(
        self, running: Stays, first: Sequence[Stay], last: Sequence[Stay], room: Room
    ) -> None:
        self._room = room
        self._first, self._last = deque(first), deque(last)
        rates = (running.last_pages - running.pages) / np.maximum(running.lasts_s, 1e-9)
        promised = running.is_promised
        self._tokens_s, self._prompts_s = 0.0, float(running.work_s.sum())
        self._spare = float(running.block_pages.sum())
        # Pages that several share are held once.
        self._held = _Growing(float(room.num_pages - room.num_free_pages), float(rates.sum()))
        self._promised = _Growing(
            float(running.pages[promised].sum()), float(rates[promised].sum())
        )
        self._ids = list(running.request_ids)
        self._pages, self._rates = running.pages.tolist(), rates.tolist()
        self._blocks, self._is_promised = running.block_pages.tolist(), promised.tolist()
        self._entered_s = [0.0] * len(self._ids)
        self._ends = sorted(zip(running.lasts_s.tolist(), range(len(self._ids)), strict=True))
        """Of those that run, soonest first: when by the tokens' clock, and its number."""
        self._last_entered_s = -math.inf
        self._start_s: dict[str, float] = {}
        self._over_s: dict[str, float] = {}
        self._crowded_s = math.inf
        self._look_for_a_crowd()

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
        self._end_all()
        return Course(self._start_s, self._over_s, self._crowded_s)

    def _fits(self, stay: Stay) -> bool:
        if not self._ends:
            return True
        num_free = self._room.num_pages - max(0.0, self._held.at(self._tokens_s))
        needed = stay.pages + self._spare
        return len(self._ends) < self._room.num_slots and needed <= num_free + _ROUNDING_PAGES

    def _enter(self, stay: Stay) -> None:
        now_s, number = self._tokens_s, len(self._ids)
        rate = (stay.last_pages - stay.pages) / max(stay.lasts_s, 1e-9)
        self._prompts_s += stay.work_s
        self._spare += stay.block_pages
        heapq.heappush(self._ends, (now_s + stay.lasts_s, number))
        self._ids.append(stay.request_id)
        self._pages.append(stay.pages)
        self._rates.append(rate)
        self._blocks.append(stay.block_pages)
        self._is_promised.append(stay.is_promised)
        self._entered_s.append(now_s)
        self._held.add(stay.pages, rate, now_s)
        if stay.is_promised:
            self._promised.add(stay.pages, rate, now_s)
            self._look_for_a_crowd()

    def _end_one(self) -> None:
        """Let the time pass until the next one is over."""
        self._tokens_s, number = heapq.heappop(self._ends)
        self._look_for_a_crowd()
        self._over_s[self._ids[number]] = self._now_s
        self._spare -= self._blocks[number]
        growth = self._pages[number], self._rates[number], self._entered_s[number]
        self._held.add(*growth, sign=-1)
        if self._is_promised[number]:
            self._promised.add(*growth, sign=-1)

    def _end_all(self) -> None:
        """Let the time pass until all are over; nobody enters any more."""
        self._ends.sort()
        ends_s = np.array([end_s for end_s, _ in self._ends])
        at = np.array([number for _, number in self._ends], dtype=np.intp)
        over_s = ends_s + self._prompts_s
        self._over_s.update(zip([self._ids[i] for i in at], over_s.tolist(), strict=True))
        rates = np.where(np.array(self._is_promised)[at], np.array(self._rates)[at], 0.0)
        firsts = np.array(self._pages)[at] - rates * np.array(self._entered_s)[at]
        bases = np.where(np.array(self._is_promised)[at], firsts, 0.0)
        left = self._promised
        held = left.base - (np.cumsum(bases) - bases)  # before each of them is over
        held += (left.rate - (np.cumsum(rates) - rates)) * ends_s
        crowds = over_s[held > self._room.num_pages + _ROUNDING_PAGES]
        if len(crowds):
            self._crowded_s = min(self._crowded_s, float(crowds[0]))

    def _look_for_a_crowd(self) -> None:
        if self._promised.at(self._tokens_s) > self._room.num_pages + _ROUNDING_PAGES:
            self._crowded_s = min(self._crowded_s, self._now_s)


@dataclass
class _Growing:
    """Pages held by some requests, each growing evenly from its first to its last."""

    base: float
    rate: float

    def at(self, now_s: float) -> float:
        return self.base + self.rate * now_s

    def add(self, pages: float, rate: float, entered_s: float, sign: int = 1) -> None:
        self.base += sign * (pages - rate * entered_s)
        self.rate += sign * rate
