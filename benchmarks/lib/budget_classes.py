"""Budgets for a trace: three classes, as multiples of what a request takes alone at full depth."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.lib.workload import RequestSpec

__all__ = ["CLASSES", "BudgetClass", "Budgeted", "Unloaded", "draw_class", "plan_budgets", "scaled"]


@dataclass(frozen=True)
class BudgetClass:
    """Requests that grant so many times their unloaded full-depth time."""

    name: str
    share: float
    """Of all requests."""
    factor: float

    def latency_ms(self, unloaded: Unloaded, spec: RequestSpec) -> float:
        """The whole answer's budget."""
        return round(1e3 * self.factor * unloaded.e2e_s(spec), 1)

    def budget(
        self, unloaded: Unloaded, spec: RequestSpec, on_miss: str, min_quality: float | None = None
    ) -> dict[str, Any]:
        """The budget object of a request."""
        budget = {"latency_ms": self.latency_ms(unloaded, spec), "on_miss": on_miss}
        return budget if min_quality is None else {**budget, "min_quality": min_quality}


CLASSES = (
    BudgetClass("tight", 0.3, 1.5),
    BudgetClass("medium", 0.4, 3.0),
    BudgetClass("loose", 0.3, 8.0),
)


@dataclass(frozen=True)
class Unloaded:
    """What one request takes alone, at full depth."""

    prefill_s: Callable[[int], float]
    token_s: float

    def e2e_s(self, spec: RequestSpec) -> float:
        """The whole answer."""
        return self.prefill_s(spec.num_prompt_tokens) + (spec.num_output_tokens - 1) * self.token_s


def draw_class(rng: random.Random) -> BudgetClass:
    """A class at random, by the shares."""
    return rng.choices(CLASSES, [c.share for c in CLASSES])[0]


@dataclass(frozen=True)
class Budgeted:
    """What one request of a trace is sent with, and graded by."""

    budget: dict[str, Any]
    """The budget object."""
    budget_class: BudgetClass | None
    """None: it has no budget of time."""


def plan_budgets(
    specs: Sequence[RequestSpec],
    unloaded: Unloaded,
    *,
    pinned: int | None,
    seed: int,
    on_miss: str = "reject",
    min_quality: float | None = None,
    unbudgeted: float = 0.0,
) -> list[Budgeted]:
    """The budgets of a trace, the same for every system that is compared.

    Args:
        specs: scaled, in order.
        unloaded: what budgets are multiples of.
        pinned: the exit that every request names instead; it is graded by its class all the same.
        seed: of the classes.
        on_miss: what every budget says.
        min_quality: the floor that every budget names; None: none.
        unbudgeted: share of the requests without a budget.
    """
    rng, planned = random.Random(seed), []
    for spec in specs:
        budget_class: BudgetClass | None = draw_class(rng)
        assert budget_class is not None
        budget = budget_class.budget(unloaded, spec, on_miss, min_quality)
        if unbudgeted and rng.random() < unbudgeted:
            budget_class, budget = None, {}
        planned.append(Budgeted({"exit_layer": pinned} if pinned else budget, budget_class))
    return planned


def scaled(
    specs: Sequence[RequestSpec], *, lengths: float, rate: float, max_prompt_tokens: int
) -> list[RequestSpec]:
    """A trace with its lengths times ``lengths`` and its mean rate set to ``rate`` a second."""
    own_rate = (len(specs) - 1) / max(specs[-1].due_s - specs[0].due_s, 1e-9)
    return [
        replace(
            spec,
            due_s=(spec.due_s - specs[0].due_s) * own_rate / rate,
            num_prompt_tokens=min(
                max(1, round(spec.num_prompt_tokens * lengths)), max_prompt_tokens
            ),
            num_output_tokens=max(1, round(spec.num_output_tokens * lengths)),
        )
        for spec in specs
    ]
