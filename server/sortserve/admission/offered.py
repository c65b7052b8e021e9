"""What comes in lately, and so what a promise to one newcomer costs those who come after it.

A promise that leaves little time to spare keeps others' prompts waiting for as long as it lives: a
prompt that is read takes its time from every answer beside it. At one request a minute that costs
nobody anything; where ten come a second, an answer that has half a second to spare over ten seconds
keeps most of them out. So a newcomer is let in only if it is worth what others are expected to
lose by it. With a the share of the machine that arriving prompts ask for,

    too much = max over answers of a * (time until it should be over) - (what it can spare by then)

is work that will find no room, and costs what prompts of so much work are worth.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sortserve.scheduling.columns import Floats

__all__ = ["NOTHING_OFFERED", "Offered", "OfferedLoad"]

WINDOW = 64
"""The latest requests that count."""
LEAST = 8
"""Fewer say nothing."""
MOST_SHARE = 0.5
"""Of the machine for the prompts of later requests: the rest makes their tokens."""
LOST_SHARE = 1 / 3
"""Of the work that finds no room; the rest has time and waits."""


@dataclass(frozen=True)
class OfferedLoad:
    """What arrives a second."""

    share: float
    """Of the machine, for reading prompts; it counts no further than ``MOST_SHARE``."""
    worth: float
    """Of the answers to so many prompts as take a second to read, those in time alone."""

    def loss(self, end_s: Floats, spare_s: Floats, now: float) -> float:
        """The worth that later requests are expected to lose beside some answers.

        Args:
            end_s: [n] when each should be over; infinite where nothing was promised.
            spare_s: [n] what each can spare by then (``full_batch.Course.spare_s``).
            now: the engine's clock.
        """
        ends = np.isfinite(end_s)
        share = min(self.share, MOST_SHARE)
        too_much = share * (end_s[ends] - now) - np.maximum(spare_s[ends], 0.0)
        return LOST_SHARE * self.worth * float(too_much.max(initial=0.0))


NOTHING_OFFERED = OfferedLoad(0.0, 0.0)


class _Arrival(NamedTuple):
    at_s: float
    work_s: float
    worth: float


class Offered:
    """Owns the latest arrivals, those that were refused for want of room included."""

    def __init__(self) -> None:
        self._latest: deque[_Arrival] = deque(maxlen=WINDOW)

    def note(self, now: float, work_s: float, worth: float) -> None:
        """A request has come.

        Args:
            now: when.
            work_s: what reading its prompt takes, as often as it is read.
            worth: of its answers in time; 0 if it bounds no time.
        """
        assert math.isfinite(work_s)
        assert work_s >= 0.0
        assert worth >= 0.0
        self._latest.append(_Arrival(now, work_s, worth))

    def load(self, now: float) -> OfferedLoad:
        """What arrives a second, as far as the latest requests say."""
        arrivals = list(self._latest)  # a copy: any thread may ask
        if len(arrivals) < LEAST:
            return NOTHING_OFFERED
        first, *latest = arrivals
        work_s = sum(arrival.work_s for arrival in latest)
        if work_s <= 0.0:
            return NOTHING_OFFERED
        passed_s = max(now - first.at_s, work_s * 1e-3)
        worth = sum(arrival.worth for arrival in latest)
        return OfferedLoad(work_s / passed_s, worth / work_s)

    def check_invariants(self) -> None:
        """Assert that what is remembered is in order."""
        times = [arrival.at_s for arrival in self._latest]
        assert times == sorted(times)
        assert len(times) <= WINDOW
