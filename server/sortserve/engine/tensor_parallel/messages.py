"""What rank 0 and another rank say to each other, over a socket that nobody else has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow

if TYPE_CHECKING:
    from sortserve.engine.options import EngineOptions

__all__ = [
    "Done",
    "Failed",
    "LoadedShare",
    "Log",
    "Ready",
    "Start",
    "Step",
    "Task",
    "without_words",
]


@dataclass(frozen=True, kw_only=True)
class Task:
    """First of all, to a rank: what it is to load."""

    rank: int
    num_ranks: int
    source: str
    loading: Mapping[str, Any]
    """Further arguments of ``load_share``."""
    options: EngineOptions
    num_threads: int | None


@dataclass(frozen=True)
class LoadedShare:
    """From a rank: it has its share, and room for so many pages."""

    num_pages: int
    failed_backends: tuple[str, ...] = ()
    """Those that failed their check on its device."""


@dataclass(frozen=True)
class Start:
    """To a rank: allocate so many pages, and meet the others."""

    num_pages: int


@dataclass(frozen=True)
class Ready:
    """From a rank: it waits for steps."""


@dataclass(frozen=True)
class Step:
    """To a rank: run this. Steps are numbered from 1."""

    number: int
    plan: StepPlan


@dataclass(frozen=True)
class Done:
    """From a rank: a step has ended."""

    number: int
    num_calls: int
    """Collectives that it took part in."""
    error: str | None
    """What it raised."""


@dataclass(frozen=True)
class Failed:
    """From a rank, the last: it cannot go on."""

    error: str


@dataclass(frozen=True)
class Log:
    """From a rank: something for the log."""

    logger: str
    level: int
    message: str


def without_words(plan: StepPlan) -> StepPlan:
    """A plan as the other ranks need it: which rows sample, but not how, nor after what."""
    assert all(row.token_from is None for row in plan.rows), "only rank 0 knows what was sampled"
    rows = (
        replace(
            row,
            token_ids=tuple(row.token_ids),
            sampling=None if row.sampling is None else _SAMPLES,
            num_output_tokens=None,
        )
        for row in plan.rows
    )
    return StepPlan(rows=tuple(rows), depth_cap=plan.depth_cap)


_SAMPLES = SamplingRow(
    params=SamplingParams(temperature=0.0),
    seed=0,
    prompt_token_ids=(),
    output_token_ids=(),
    stop_token_ids=frozenset(),
)
