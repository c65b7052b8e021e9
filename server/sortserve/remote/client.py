"""Engines elsewhere, as the HTTP service sees one engine. For the event loop's thread."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from sortserve.admission.queue_limits import QueueLimits, Reservation
from sortserve.core.budget import Budget, ExitTable
from sortserve.core.errors import UnavailableError
from sortserve.core.request import AdmissionStats, EngineStats, Estimate, Request
from sortserve.engine.ledger import State
from sortserve.engine.stream import RequestStream
from sortserve.remote.group import Group
from sortserve.remote.link import Link
from sortserve.replicas.choice import RoutedRequest
from sortserve.replicas.load import EngineLoad
from sortserve.replicas.messages import ReplicaReport
from sortserve.scheduling.prefix_heads import prefix_digests

__all__ = ["RemoteEngines"]

POLL_S = 0.02
ABORT_S = 1.0
"""Seconds that replicas get to hear of an abort."""


class RemoteEngines:
    """Sends requests to replicas over a link. Implements the service's ``EngineClient``.

    Args:
        link: carries them, and knows the replicas.
        exits: what all of them serve.
        max_model_len: prompt and answer together, in tokens.
        clock: monotonic.
        unix_clock: time of day.
        max_num_queued_reqs: most requests that are tokenised at once.
        max_num_queued_tokens: most prompt tokens of them.
    """

    failure: str | None = None
    """Never: a replica that fails is started anew by others."""

    def __init__(
        self,
        link: Link,
        exits: ExitTable,
        max_model_len: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        max_num_queued_reqs: int = 512,
        max_num_queued_tokens: int = 200_000,
    ) -> None:
        self.clock = clock
        self.exits = exits
        self.max_model_len = max_model_len
        self._link = link
        self._unix_clock = unix_clock
        self._limits = QueueLimits(
            max_requests=max_num_queued_reqs, max_tokens=max_num_queued_tokens
        )
        self.groups: set[Group] = set()
        """Those that have not ended; only to be looked at."""
        self._is_draining = self._is_stopped = False

    # ---- how they stand ----

    @property
    def state(self) -> State:
        """Ready if any replica takes requests, else loading; or this client's own end."""
        if self._is_stopped:
            return "stopped"
        if self._is_draining:
            return "draining"
        reports = self._reports()
        return "ready" if any(report.is_accepting for report in reports) else "loading"

    @property
    def replica_states(self) -> Mapping[str, str]:
        """The state of each replica by its name."""
        return self._link.directory.states()

    def _reports(self) -> list[ReplicaReport]:
        return [own for own in self._link.directory.reports().values() if own is not None]

    def stats(self) -> EngineStats:
        """The sums over all replicas, a moment ago."""
        every = [report.stats for report in self._reports()]
        running: Counter[int] = Counter()
        for stats in every:
            running.update(stats.running_by_exit)
        return EngineStats(
            running_by_exit=dict(running),
            num_waiting=sum(own.num_waiting for own in every),
            num_waiting_tokens=sum(own.num_waiting_tokens for own in every),
            kv_pages_used=sum(own.kv_pages_used for own in every),
            kv_pages_cached=sum(own.kv_pages_cached for own in every),
            kv_pages_total=sum(own.kv_pages_total for own in every),
        )

    def load(self) -> EngineLoad:
        """What the replica says of itself that has the least pressure.

        Raises:
            UnavailableError: none has said anything.
        """
        every = [own.load for own in self._reports()]
        if not every:
            raise UnavailableError("No replica has reported yet.", code="loading")
        return min(every, key=lambda own: (not own.is_accepting, own.pressure))

    def admission_stats(self, budget: Budget) -> AdmissionStats:
        """What a newcomer would meet at the replica with the least pressure."""
        every = [own.admission for own in self._reports() if own.is_accepting]
        return min(every, key=lambda own: own.pressure, default=AdmissionStats())

    def estimate(self, exit_layer: int, num_prompt_tokens: int, max_tokens: int) -> Estimate | None:
        """Of a typical newcomer at the replica where its first token comes first."""
        found = [
            (own.ttft_ms, own.tpot_ms)
            for report in self._reports()
            if report.is_accepting and report.load.is_calibrated
            for own in report.load.exits
            if own.exit_layer == exit_layer
        ]
        known = [(ttft / 1e3, tpot / 1e3) for ttft, tpot in found if ttft is not None and tpot]
        if not known:
            return None
        ttft_s, tpot_s = min(known)
        return Estimate(ttft_s, tpot_s, ttft_s + (max_tokens - 1) * tpot_s)

    # ---- requests ----

    def reserve(self, num_requests: int, num_tokens: int) -> Reservation:
        """Take places among those that are tokenised; the queue is the replica's.

        Raises:
            InvalidRequestError: more requests at once than may ever wait.
            OverloadedError: too many are; 429 with Retry-After.
            UnavailableError: no replica takes requests; 503.
        """
        self._require_accepting()
        return self._limits.reserve(num_requests, num_tokens, retry_after_s=lambda *_: 1.0)

    def _require_accepting(self) -> None:
        state = self.state
        if state != "ready":
            raise UnavailableError(
                f"The server is {state} and takes no new requests.",
                code=state,
                retry_after_s=5.0,
            )

    async def submit_all(
        self,
        requests: Sequence[Request],
        reservation: Reservation,
        *,
        is_streamed: bool = True,
        num_samples: int = 1,
    ) -> list[RequestStream]:
        """Let a replica have all of them, or none.

        Args:
            requests: the samples of each prompt after one another.
            reservation: given back by the caller: the replica has a queue of its own.
            is_streamed: whether each output is read as it comes; else the reply is sent when it is
                whole, and its request survives the loss of its replica.
            num_samples: of each prompt.

        Raises:
            SortserveError: the replicas that were asked refused one of them, and none runs.
        """
        self._require_accepting()
        group = Group(
            requests,
            num_samples=num_samples,
            routed=self._routed(requests, num_samples),
            link=self._link,
            clock=self.clock,
            unix_clock=self._unix_clock,
            is_streamed=is_streamed,
            is_open=lambda: not self._is_stopped,
        )
        self.groups.add(group)
        try:
            await group.accepted()
        finally:
            assert group.task is not None
            group.task.add_done_callback(lambda _: self.groups.discard(group))
        return group.streams

    def _routed(self, requests: Sequence[Request], num_samples: int) -> RoutedRequest:
        longest = max(requests, key=lambda own: len(own.prompt_token_ids))
        prompts = requests[::num_samples]
        sizes = {own.load.block_size for own in self._reports()}
        prefixes: list[tuple[int, str]] = []
        if len(sizes) == 1:
            prefixes = prefix_digests(
                longest.prompt_token_ids, block_size=sizes.pop(), salt=longest.cache_salt
            )
        return RoutedRequest(
            arrival_s=longest.arrival_s,
            num_prompt_tokens=sum(len(own.prompt_token_ids) for own in prompts),
            num_output_tokens=longest.expected_tokens
            or min(longest.sampling.max_tokens, self.max_model_len),
            budget=longest.budget,
            weight=longest.weight,
            prefixes=tuple(prefixes),
        )

    # ---- life ----

    def start(self, prepare: Callable[[], None] | None = None) -> None:
        """Nothing to start: the replicas run already. ``prepare`` is called."""
        if prepare is not None:
            prepare()

    async def drain(self, timeout_s: float) -> bool:
        """Take no new work, let live requests finish, end the rest; True if none had to be."""
        self._is_draining = True
        deadline = self.clock() + timeout_s
        while self.groups and self.clock() < deadline:
            await asyncio.sleep(POLL_S)
        clean = not self.groups
        self._is_stopped = True
        groups = list(self.groups)
        for group in groups:
            group.abort_all()
        tasks = [group.task for group in groups if group.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=ABORT_S)
        return clean

    def stop(self, timeout_s: float | None = None) -> bool:
        """Take nothing any more. Any thread; what runs is ended by ``drain``, or by the link."""
        self._is_draining = self._is_stopped = True
        return True

    def check_invariants(self) -> None:
        """No group is kept that has ended."""
        self._link.directory.check_invariants()
        assert all(group.task is None or not group.task.done() for group in self.groups)
