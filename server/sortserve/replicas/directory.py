"""What a router knows of its replicas, and where it sends a request (no torch, no Ray)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from sortserve.replicas.book import ReplicaBook
from sortserve.replicas.choice import Choice, RoutedRequest, Sent, choose_replica
from sortserve.replicas.messages import ReplicaReport

__all__ = ["Directory"]

logger = logging.getLogger(__name__)

SILENT = "loading"
"""The state of a replica that has not reported yet."""


class Directory:
    """The replicas that there are, and a ``ReplicaBook`` of them. Any thread may call.

    Args:
        clock: monotonic.
        choose: the decision.
        report_lag_s: so long ago a report was made that is seen now: replicas have other clocks.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        choose: Callable[..., Choice] = choose_replica,
        *,
        report_lag_s: float = 0.3,
    ) -> None:
        self.clock = clock
        self._choose = choose
        self._report_lag_s = report_lag_s
        self._lock = threading.Lock()
        self._reports: dict[str, ReplicaReport | None] = {}
        self._book = ReplicaBook()
        self._places: dict[str, str | None] = {}
        """Where each request is that is under way; None: nowhere yet."""

    def update(self, reports: Mapping[str, ReplicaReport | None]) -> None:
        """These are the replicas that there are now, with what each has said last."""
        made_s = self.clock() - self._report_lag_s
        with self._lock:
            for name in self._reports.keys() - reports.keys():
                self._forget(name)
            for name, report in reports.items():
                is_new = report is not None and report != self._reports.get(name)
                self._reports[name] = report
                if report is not None and is_new:
                    load = replace(report.load, is_accepting=report.is_accepting)
                    self._book.report(name, load, made_s)

    def lose(self, replica_id: str) -> None:
        """It is gone: nothing is sent there any more."""
        with self._lock:
            self._forget(replica_id)

    def _forget(self, name: str) -> None:
        self._reports.pop(name, None)
        self._book.forget(name)

    def rank(
        self, routed: RoutedRequest, among: Iterable[str], *, not_to: Collection[str] = ()
    ) -> list[str]:
        """Where to send a request, the best first; those of ``not_to`` only if there is no other.

        A replica that says that it takes nothing comes last: its word is a second old.
        """
        names = list(among)
        allowed = [name for name in names if name not in not_to] or names
        now = self.clock()
        with self._lock:
            candidates = self._book.candidates(names, now=now)
            mix = self._book.mix.copy()
        try:
            left_out = set(names) - set(allowed)
            choice = self._choose(candidates, routed, now=now, mix=mix, not_to=left_out)
            ranked = [own.replica_id for own in choice.ranked if own.replica_id in allowed]
        except Exception:  # a request that cannot be judged must go somewhere
            logger.exception("the replicas could not be ranked: the least busy one is taken")
            by_number = sorted(candidates, key=lambda c: c.num_ongoing)
            ranked = [own.replica_id for own in by_number if own.replica_id in allowed]
        return ranked + [name for name in allowed if name not in ranked]

    def begin(self, key: str) -> None:
        """A request is under way: until ``end`` it counts where it is sent."""
        with self._lock:
            self._places[key] = None

    def send(self, replica_id: str, key: str, routed: RoutedRequest) -> None:
        """A request goes to a replica, and not to another that it was to go to before.

        It counts from here on, as those that are ranked in the same moment must know of it.

        Args:
            replica_id: where to.
            key: unique among the requests that are under way; of others nothing is noted.
            routed: the request.
        """
        self._place(replica_id, key, routed, None)

    def accept(self, replica_id: str, key: str, routed: RoutedRequest, exit_layer: int) -> None:
        """The replica has let it in at that exit."""
        self._place(replica_id, key, routed, exit_layer)

    def _place(
        self, replica_id: str, key: str, routed: RoutedRequest, exit_layer: int | None
    ) -> None:
        sent = Sent(request=routed, exit_layer=exit_layer, sent_s=self.clock())
        with self._lock:
            if key not in self._places:  # it was given up meanwhile
                return
            before = self._places[key]
            if before is not None and before != replica_id:
                self._book.end(before, key)
            self._places[key] = replica_id
            self._book.send(replica_id, key, sent, is_again=before is not None)

    def place_of(self, key: str) -> str | None:
        """Where a request is; None: it is not under way."""
        with self._lock:
            return self._places.get(key)

    def end(self, key: str) -> None:
        """It is over, however it ended, or will not be sent at all."""
        with self._lock:
            replica_id = self._places.pop(key, None)
            if replica_id is not None:
                self._book.end(replica_id, key)

    def reports(self) -> dict[str, ReplicaReport | None]:
        """Of every replica that there is; None: it has not reported yet."""
        with self._lock:
            return dict(sorted(self._reports.items()))

    def states(self) -> dict[str, str]:
        """Of every replica that there is."""
        return {
            name: SILENT if report is None else report.state
            for name, report in self.reports().items()
        }

    def check_invariants(self) -> None:
        """See ``ReplicaBook``."""
        with self._lock:
            self._book.check_invariants()
