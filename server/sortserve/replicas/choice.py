"""Which replica gets a request: pure, from what the replicas last said (no torch, no clock).

A router never promises anything for a replica. It ranks them; the replica's own admission has the
last word, and what it refuses is sent once more, to the next of the ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sortserve.core.budget import Budget
from sortserve.replicas.load import EngineLoad

__all__ = ["Candidate", "Choice", "Ranked", "RoutedRequest", "Sent", "choose_replica"]


@dataclass(frozen=True, kw_only=True)
class RoutedRequest:
    """What a router knows of a request. Times are on the router's own clock."""

    arrival_s: float
    """When it came to the router: deadlines count from here, whoever serves it."""
    num_prompt_tokens: int
    num_output_tokens: int
    """To plan for: ``max_tokens``, or what such answers come to."""
    budget: Budget = field(default_factory=Budget)
    """Its times count from ``arrival_s``."""
    weight: float = 1.0
    prefixes: Sequence[tuple[int, str]] = ()
    """Its leading tokens as ``prefix_digests`` names them: (tokens, digest), ascending."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A request that this router has sent to a replica, of which no report knows yet."""

    request: RoutedRequest
    exit_layer: int | None
    """Where it was expected to run; None: nowhere in time."""
    sent_s: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A replica as the router sees it."""

    replica_id: str
    load: EngineLoad | None
    """None: it has not said anything yet."""
    age_s: float = 0.0
    """Since the report was made."""
    sent: Sequence[Sent] = ()
    """What this router has sent there since."""
    num_ongoing: int = 0
    """All requests that this router has there now: what is known of a replica that is silent."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What a request is predicted to get at a replica."""

    replica_id: str
    exit_layer: int | None
    """The deepest exit that fits its budget; None: none does."""
    ttft_ms: float | None
    """Predicted, from its arrival; None: nothing is known."""
    tpot_ms: float | None
    pressure: float
    """Of the replica, with what was sent there since its report and this request."""
    num_cached_tokens: int
    """Of its prompt, as far as the report says."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """All replicas, the best first."""

    ranked: tuple[Ranked, ...]

    @property
    def fits(self) -> bool:
        """Whether any replica is predicted to keep the budget."""
        return any(replica.exit_layer is not None for replica in self.ranked)


def choose_replica(
    candidates: Sequence[Candidate], request: RoutedRequest, *, now: float
) -> Choice:
    """Rank the replicas for a request: where the deepest exit that fits its budget is reachable.

    Of those where the same exit fits, one that has more of its prompt in its cache comes first,
    then the one with the least pressure; of equals the lower id. Replicas that take nothing are
    left out; with none left the ranking is empty.

    Args:
        candidates: in any order, ids distinct.
        request: to be sent.
        now: on the router's clock.
    """
    raise NotImplementedError
