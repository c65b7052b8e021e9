"""What one router knows of its replicas: their last reports, and what it has sent them (no torch).

The book is written by the router as things happen, and read as ``Candidate`` s for a decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sortserve.replicas.bands import Mix
from sortserve.replicas.choice import Candidate, Sent
from sortserve.replicas.load import EngineLoad
from sortserve.replicas.place import pace_of

__all__ = ["TRANSIT_S", "ReplicaBook"]

TRANSIT_S = 0.01
"""A report knows of a request that was sent so much earlier: for a moment it counts twice rather
than not at all."""


@dataclass
class _Page:
    load: EngineLoad | None = None
    first_load: EngineLoad | None = None
    made_s: float = 0.0
    ongoing: set[str] = field(default_factory=set)
    unseen: dict[str, Sent] = field(default_factory=dict)
    """Those of the ongoing requests that the report does not know."""


class ReplicaBook:
    """Owns the reports and the requests under way. Times are on the router's clock."""

    def __init__(self) -> None:
        self._pages: dict[str, _Page] = {}
        self.mix = Mix()
        """Of the requests that were sent."""

    def report(self, replica_id: str, load: EngineLoad, made_s: float) -> None:
        """A replica has said how it stands; an older report than the last changes nothing.

        Args:
            replica_id: who.
            load: what it said.
            made_s: when it was made; when it came, where clocks differ.
        """
        page = self._pages.setdefault(replica_id, _Page())
        if page.load is not None and made_s < page.made_s:
            return
        page.load, page.made_s = load, made_s
        if page.first_load is None and load.is_calibrated:
            page.first_load = load
        page.unseen = {
            id_: sent for id_, sent in page.unseen.items() if sent.sent_s + TRANSIT_S > made_s
        }

    def send(self, replica_id: str, request_id: str, sent: Sent, *, is_again: bool = False) -> None:
        """A request goes to a replica; ``is_again``: it was sent before, there or elsewhere."""
        page = self._pages.setdefault(replica_id, _Page())
        if not is_again:
            loads = {name: own.first_load for name, own in self._pages.items()}
            pace = pace_of(sent.request, loads, now=sent.sent_s)
            if pace is not None:
                self.mix.add(pace)
        page.ongoing.add(request_id)
        page.unseen[request_id] = sent

    def end(self, replica_id: str, request_id: str) -> None:
        """It is over there, or was refused."""
        page = self._pages.get(replica_id)
        if page is not None:
            page.ongoing.discard(request_id)
            page.unseen.pop(request_id, None)

    def forget(self, replica_id: str) -> None:
        """A replica is gone."""
        self._pages.pop(replica_id, None)

    def candidates(self, replica_ids: Iterable[str], *, now: float) -> list[Candidate]:
        """What is known of some replicas; nothing changes."""
        found = []
        for replica_id in replica_ids:
            page = self._pages.get(replica_id) or _Page()
            found.append(
                Candidate(
                    replica_id=replica_id,
                    load=page.load,
                    age_s=max(0.0, now - page.made_s),
                    sent=tuple(page.unseen.values()),
                    num_ongoing=len(page.ongoing),
                    first_load=page.first_load,
                )
            )
        return found

    def check_invariants(self) -> None:
        """Assert that what no report knows is under way."""
        for page in self._pages.values():
            assert set(page.unseen) <= page.ongoing
            assert all(
                page.load is None or sent.sent_s + TRANSIT_S > page.made_s
                for sent in page.unseen.values()
            )
