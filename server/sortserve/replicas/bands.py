"""Which replicas a request is at home at: the hurried keep apart from those that can wait (pure).

One row that wants a token every 15 ms makes its replica step so often, and all who are there ride
along; but what those steps take is gone for prompts. With a few hurried requests on every replica
each pays for that. So the replicas stand in a row, the fastest first, and the requests beside it,
the most hurried first, each with the share of all machines that requests like it have needed
lately: a request is at home where it stands, and a little to both sides. The most hurried all
stand at the very front, and go on from there as replicas fill, so that few are given up to them.
The row is cut anew with each request: it follows the traffic, and nobody has to name classes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Mix", "Pace", "at_home", "row_of"]

MAX_HURRY = 0.8
"""Who is more hurried counts as this: some of a machine must be left for prompts and rows."""
REACH = 1.5
"""So many replicas to both sides are home, too."""
NUM_LATEST = 256
"""Requests that are remembered."""
LEAST_NUM = 32
"""Of fewer nothing is concluded: everybody is at home everywhere."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a request uses a machine, at its floor."""

    hurry: float
    """Share of the machine that steps at its pace take, however many ride along; at most
    ``MAX_HURRY``."""
    work_s: float
    """Time of the machine for its prompt and its rows, beside those steps."""

    @property
    def need_s(self) -> float:
        """Time of a machine that steps at its pace, so that as much as its work is left."""
        return self.work_s / (1.0 - self.hurry)


class Mix:
    """The latest requests of a router."""

    def __init__(self) -> None:
        self._latest: deque[Pace] = deque(maxlen=NUM_LATEST)

    def add(self, pace: Pace) -> None:
        """One more has come."""
        self._latest.append(pace)

    def copy(self) -> Mix:
        """The same, for another thread."""
        copied = Mix()
        copied._latest = self._latest.copy()
        return copied

    def place(self, pace: Pace) -> float | None:
        """Where a request stands: the share of all need that is of the more hurried, in [0, 1].

        None where too few are known, or all are as hurried: then there is nobody to keep apart.
        """
        total_s = sum(own.need_s for own in self._latest)
        if len(self._latest) < LEAST_NUM or total_s <= 0.0:
            return None
        more_s = sum(own.need_s for own in self._latest if own.hurry > pace.hurry)
        less_s = sum(own.need_s for own in self._latest if own.hurry < pace.hurry)
        return more_s / total_s if more_s + less_s > 0.0 else None


def row_of(token_ms: Mapping[str, float]) -> dict[str, float]:
    """The replicas in their row, each with what it is worth beside one of middling speed.

    Machines that differ by less than a factor of 1.4 are taken to be alike, whatever their
    calibrations say.

    Args:
        token_ms: how long a token takes at full depth at each; at least one.
    """
    middle_ms = statistics.median_low(token_ms.values())
    slowness = {name: round(math.log2(own_ms / middle_ms)) for name, own_ms in token_ms.items()}
    names = sorted(slowness, key=lambda name: (slowness[name], name))
    return {name: 2.0 ** -slowness[name] for name in names}


def at_home(place: float, row: Mapping[str, float]) -> set[str]:
    """The replicas where a request is at home.

    Args:
        place: see ``Mix.place``.
        row: see ``row_of``.
    """
    middle = place * sum(row.values())
    home, start = set(), 0.0
    for name, worth in row.items():
        end = start + worth
        if start - REACH <= middle <= end + REACH:
            home.add(name)
        start = end
    return home
