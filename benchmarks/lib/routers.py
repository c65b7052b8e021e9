"""Ways to choose a replica for a request, as the simulated fleet asks for one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from sortserve.core.request import Request
from sortserve.engine.timed_runner import BLANK
from sortserve.replicas.book import ReplicaBook
from sortserve.replicas.choice import Sent, choose_replica
from sortserve.replicas.load import EngineLoad
from sortserve.replicas.routed import RoutedRequest
from sortserve.scheduling.prefix_heads import prefix_digests

__all__ = ["ROUTERS", "Ours", "PowerOfTwoChoices", "RoundRobin", "Router"]


class Router(Protocol):
    """Who sends requests to replicas 0 to n - 1, and is told what it could know of them."""

    def choose(self, request: Request, open_to: Sequence[int], now: float) -> int:
        """Where a request goes."""

    def on_ended(self, replica: int, request_id: str) -> None:
        """It is over there, or was refused."""

    def on_report(self, replica: int, load: EngineLoad) -> None:
        """A replica's report has come."""


class RoundRobin:
    """Each in turn."""

    def __init__(self, num_replicas: int, seed: int) -> None:
        self._last = num_replicas - 1
        self._num = num_replicas

    def choose(self, request: Request, open_to: Sequence[int], now: float) -> int:
        """The next one of those that are open."""
        self._last = next(
            i for k in range(1, self._num + 1) if (i := (self._last + k) % self._num) in open_to
        )
        return self._last

    def on_ended(self, replica: int, request_id: str) -> None:
        """It does not count."""

    def on_report(self, replica: int, load: EngineLoad) -> None:
        """Nor look."""


class PowerOfTwoChoices:
    """Ray Serve's default: of two replicas at random the one with fewer requests under way.

    As ``PowerOfTwoChoicesRequestRouter`` of Ray 2.60 with its cache of queue lengths, which one
    router keeps exact: a request counts from when it is sent to when it is over.
    """

    def __init__(self, num_replicas: int, seed: int) -> None:
        self._random = random.Random(f"{seed}/router")
        self._ongoing: list[set[str]] = [set() for _ in range(num_replicas)]

    def choose(self, request: Request, open_to: Sequence[int], now: float) -> int:
        """The shorter queue of two, the first drawn where they are equal."""
        drawn = self._random.sample(list(open_to), k=min(self.num_drawn(open_to), len(open_to)))
        replica = min(drawn, key=lambda i: len(self._ongoing[i]))
        self._ongoing[replica].add(request.request_id)
        return replica

    def num_drawn(self, open_to: Sequence[int]) -> int:
        """How many are looked at."""
        return 2

    def on_ended(self, replica: int, request_id: str) -> None:
        """One less."""
        self._ongoing[replica].discard(request_id)

    def on_report(self, replica: int, load: EngineLoad) -> None:
        """Ray's counts are its own."""


class ShortestQueue(PowerOfTwoChoices):
    """Of all replicas the one with the fewest requests under way."""

    def num_drawn(self, open_to: Sequence[int]) -> int:
        """All of them."""
        return len(open_to)


class Ours:
    """``sortserve.replicas.choice`` over the last reports."""

    def __init__(self, num_replicas: int, seed: int) -> None:
        self.book = ReplicaBook()
        self.num_replicas = num_replicas
        self.block_size = 16

    def choose(self, request: Request, open_to: Sequence[int], now: float) -> int:
        """The first of the ranking."""
        prompt = request.prompt_token_ids
        is_blank = prompt[0] == BLANK  # where prompts have no tokens, nobody keeps prefixes
        routed = RoutedRequest(
            arrival_s=request.arrival_s,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=request.sampling.max_tokens or 1,
            budget=request.budget,
            weight=request.weight,
            prefixes=() if is_blank else prefix_digests(prompt, block_size=self.block_size),
        )
        names = [str(i) for i in range(self.num_replicas)]
        candidates = self.book.candidates(names, now=now)
        not_to = set(names) - {str(i) for i in open_to}
        choice = choose_replica(candidates, routed, now=now, mix=self.book.mix, not_to=not_to)
        best = choice.ranked[0]
        sent = Sent(request=routed, exit_layer=best.exit_layer, sent_s=now)
        is_again = len(open_to) < self.num_replicas
        self.book.send(best.replica_id, request.request_id, sent, is_again=is_again)
        return int(best.replica_id)

    def on_ended(self, replica: int, request_id: str) -> None:
        """Off the book."""
        self.book.end(str(replica), request_id)

    def on_report(self, replica: int, load: EngineLoad) -> None:
        """Into the book."""
        self.book.report(str(replica), load, load.time_s)


ROUTERS: dict[str, Callable[[int, int], Router]] = {
    "round-robin": RoundRobin,
    "power-of-two": PowerOfTwoChoices,
    "shortest-queue": ShortestQueue,
    "ours": Ours,
}
"""By name: made of the number of replicas and a seed."""
