"""What a router knows of a request (pure, no torch, no clock)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sortserve.core.budget import Budget, Deadlines
from sortserve.replicas.load import EngineLoad
from sortserve.scheduling.demand import targets_of

__all__ = ["RoutedRequest", "num_cached_tokens"]


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

    @property
    def deadlines(self) -> Deadlines:
        """What it is paced to."""
        return targets_of(self.budget.deadlines(self.arrival_s), self.arrival_s)


def num_cached_tokens(load: EngineLoad, request: RoutedRequest, exit_layer: int) -> int:
    """Leading tokens of a request that a replica's cache holds at least as deep as an exit."""
    held = [
        num_tokens
        for num_tokens, digest in request.prefixes
        if load.prefixes.get(digest, 0) >= exit_layer
    ]
    return max(held, default=0)
