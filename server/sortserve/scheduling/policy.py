"""What a policy is: the decisions that scheduling leaves to it.

In lock-step a row that exits at layer 9 waits for the rows that run to 30 before it can start its
next token, so depth saves arithmetic and gains no latency. A step therefore has a *depth cap*: rows
of deeper exits sit it out, rows at or below it run. A policy chooses the cap. It may
also choose the rows, and say who goes shallower, who enters first, and who is preempted.

It decides by pure functions of plain values, so a new one is a module of functions in ``policies/``
and a line in ``policies/table.py``. What it decides is checked where it is asked (see
``Decisions``): one that fails costs nobody an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.objective import Worth

__all__ = [
    "LEAST_STEP_S",
    "MOST_STEPS",
    "DepthClass",
    "Lowering",
    "Policy",
    "Situation",
    "StepChoice",
]

LEAST_STEP_S = 1e-9
"""A step that costs nothing counts as this."""
MOST_STEPS = 4.0
"""Prompts that are read beside rows make a step longer by so many like it at most. Who comes in the
middle of a step waits for its end, and the rows want their tokens."""

Lowering = tuple[str, int]
"""A request and the exit it goes on at."""


@dataclass(frozen=True)
class DepthClass:
    """The rows of one exit that have work."""

    exit_layer: int
    num_rows: int
    cost: float
    """Relative cost of one step to this depth (the exit's share of the full model's FLOPs)."""
    service: float
    """Cost of the steps this class has had a part in, since it became busy."""


@dataclass(frozen=True)
class Situation:
    """What the next step is chosen from."""

    now: float
    rows: Sequence[Demand]
    """The running requests."""
    classes: Sequence[DepthClass]
    """The depths they run at, with the service each has had."""
    costs: StepCosts
    max_num_tokens: int
    """Most tokens of one step."""


@dataclass(frozen=True)
class StepChoice:
    """What the next step is to be."""

    cap: int
    request_ids: tuple[str, ...]
    """Rows to run, prompts in the order in which they get tokens."""
    num_prompt_tokens: int
    """Most tokens that all prompts together get."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What decides, as functions; a decision that is None is made in the plain way.

    ``cap`` and ``rates`` work without times. The other decisions see what each request needs and by
    when, so they are asked only once the costs of steps are known.
    """

    name: str
    about: str
    """What it does, to follow its name in a sentence."""
    cap: Callable[[Sequence[DepthClass]], int]
    """The depth of the next step: one of the exits that have rows."""
    rates: Callable[[Mapping[int, float]], dict[int, float]]
    """Steps per second that each busy exit takes part in where no times are promised, from the
    seconds of a step with its cap at each: what forecasts reckon with."""
    choose: Callable[[Situation], StepChoice] | None = None
    """Cap, rows and room for prompts. Plain: all rows up to ``cap``, prompts last."""
    lower: (
        Callable[
            [Sequence[Demand], Sequence[int], StepCosts, float, Worth],
            list[Lowering],
        ]
        | None
    ) = None
    """Who goes shallower in flight, from all live requests, the exits, costs, now, and what the
    objective says of the exits. Plain: nobody does."""
    entry_order: Callable[[Sequence[Demand], StepCosts], Sequence[Demand]] | None = None
    """The waiting requests in the order in which they enter. Plain: first come, first served. Once
    in a while the oldest of those without a promise goes first in any case."""
    victim: Callable[[Sequence[Demand]], str] | None = None
    """Whom to preempt, of running requests in order of admission. Plain: the last admitted."""
    keeps_promises: bool = False
    """Whether rows are paced by what they were promised. Admission then asks if there is room for
    one more promise; else a newcomer is told what it would see if the load stayed as it is."""

    @property
    def uses_times(self) -> bool:
        """Whether any of its decisions needs to know when requests are due."""
        return any((self.choose, self.lower, self.entry_order, self.victim))
