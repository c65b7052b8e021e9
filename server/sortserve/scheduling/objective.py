"""What the server is to make most of: the worth of a token at each exit, and of an answer at all.

Admission, lowering and refusal are one decision: of all plans that keep every promise, take the one
that loses least. A plan loses the worth of the tokens that it makes shallower, times the request's
weight, or, if it refuses the newcomer, what is at stake for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sortserve.core.budget import Budget, ExitTable
from sortserve.core.choices import chosen
from sortserve.core.schedule import DepthSchedule

__all__ = [
    "DEFAULT_OBJECTIVE",
    "OBJECTIVES",
    "Objective",
    "Worth",
    "get_objective",
    "share_of_layers",
]

LITTLE = 1e-6
"""What depth is worth where answers in time count: of requests of like weight, lowering any number
costs less than one."""


@dataclass(frozen=True)
class Worth:
    """What an objective says of a checkpoint's exits."""

    tokens: Mapping[int, float]
    """What all tokens of an answer are worth if they are of that exit: not below 0, and never less
    at a deeper one."""
    answer: Mapping[int, float]
    """What is lost where a request that could have that exit is refused, or comes too late."""
    schedules: Mapping[DepthSchedule, float] = field(default_factory=dict)
    """The depth schedules that were measured, and what all tokens of an answer under each are worth
    at most."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What counts."""

    name: str
    about: str
    """What it does, to follow its name in a sentence."""
    worth: Callable[[ExitTable], Worth]
    keeps_depth: bool = False
    """Whether every request has the deepest exit that it may have, late if need be, and stays."""
    weighs_scores: bool = False
    """Whether of two exits with the same score the deeper one is worth no time."""

    def open_to(
        self, allowed: tuple[int, ...], exits: ExitTable, budget: Budget
    ) -> tuple[int, ...]:
        """The exits that a request may get, of those that its budget allows; both ascending.

        A request without a budget of time, or that names its exits, gets depth for its own sake.
        """
        if self.keeps_depth:
            return allowed[-1:]
        is_free = budget.has_latency and not budget.fixes_depth
        if not (self.weighs_scores and is_free and exits.is_measured):
            return allowed
        best = itertools.accumulate((exits.scores[e] for e in allowed), max)
        pairs = itertools.pairwise([-math.inf, *best])
        return tuple(e for e, (below, own) in zip(allowed, pairs, strict=True) if own > below)

    def open_in_flight(self, allowed: tuple[int, ...]) -> tuple[int, ...]:
        """The exits that a request may come by as it goes shallower, of those its budget allows.

        One that is worth no time beside a shallower one is none to begin at, and none to stop at.
        """
        return allowed[-1:] if self.keeps_depth else allowed


def share_of_layers(layers: Sequence[int]) -> Worth:
    """What holds where nobody has measured anything."""
    tokens = {e: e / layers[-1] for e in layers}
    return Worth(tokens, tokens)


def quality(exits: ExitTable) -> Worth:
    """A token counts by its exit's score."""
    return Worth(exits.scores, exits.scores, exits.measured_schedules)


def attainment(exits: ExitTable) -> Worth:
    """An answer in time counts, and hardly how."""
    tokens = {e: 1.0 - LITTLE * (1.0 - e / exits.full) for e in exits.layers}
    schedules = dict.fromkeys(exits.measured_schedules, 1.0)
    return Worth(tokens, dict.fromkeys(exits.layers, 1.0), schedules)


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            name="quality",
            about="makes the most of answers in time, times their quality",
            worth=quality,
            weighs_scores=True,
        ),
        Objective(
            name="attainment",
            about="lets as many answers as possible come in time",
            worth=attainment,
        ),
        Objective(
            name="depth",
            about="gives every request the deepest exit it may have, whatever time that takes",
            worth=quality,
            keeps_depth=True,
        ),
    )
}

DEFAULT_OBJECTIVE = "quality"


def get_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ConfigError: there is none.
    """
    return chosen(OBJECTIVES, name, "objective")
