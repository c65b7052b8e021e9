"""What is known of the live requests, by two threads (no torch).

The engine's thread shows its state after each step, and which requests it has taken since. The
event loop's adds those that it has let in. Both halves change under one lock, or a request on its
way from one to the other could be counted twice, or not at all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable

from sortserve.admission.room import UNLIMITED, Room
from sortserve.scheduling.columns import Columns, LiveDemands
from sortserve.scheduling.demand import Demand

__all__ = ["Seen"]


class Seen:
    """Owns the engine's last state, and the requests on their way to it. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._demands = LiveDemands()
        self._room = UNLIMITED
        self._as_of_s = -math.inf
        self._unseen: dict[str, Demand] = {}
        self._all: tuple[tuple[Demand, ...], Columns] | None = None
        """All of them, made when they are first asked for."""

    def show(
        self,
        demands: tuple[Demand, ...],
        taken: Iterable[str] = (),
        room: Room | None = None,
        *,
        as_of_s: float = -math.inf,
    ) -> None:
        """The engine's present state.

        Args:
            demands: of all its live requests.
            taken: requests that it has taken since the state before: they are among the others now.
            room: its slots and pages; None: as before.
            as_of_s: when its requests needed what their demands say.
        """
        with self._lock:
            self._demands = LiveDemands.of(demands)
            self._all = None
            self._room = self._room if room is None else room
            self._as_of_s = as_of_s
            for request_id in taken:
                self._unseen.pop(request_id, None)

    def enter(self, demand: Demand) -> None:
        """A request is on its way to the engine."""
        with self._lock:
            is_new = demand.request_id not in self._unseen
            self._unseen[demand.request_id] = demand
            if is_new and self._all is not None:
                demands, columns = self._all
                self._all = (*demands, demand), columns.plus(Columns.of((demand,)))
            else:
                self._all = None

    def all(self) -> tuple[tuple[Demand, ...], Columns, Room, float]:
        """All live requests, those on their way last; the same as columns; the room for them.

        And when the engine was so. The same objects until something changes.
        """
        with self._lock:
            if self._all is None:
                demands = self._demands
                if self._unseen:
                    demands = LiveDemands.after(demands, (*demands, *self._unseen.values()))
                self._all = demands, demands.columns
            return *self._all, self._room, self._as_of_s
