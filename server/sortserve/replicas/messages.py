"""What a router and a replica say to each other: plain values that can be pickled (no torch).

Machines share no clock. A request carries how long ago it came, by the router's monotonic clock,
and the time of day when it was sent on. The replica takes the first as it is; of the way it counts
what its own time of day says, between 0 and ``MAX_TRANSIT_S``. So clocks that are set apart by
more can cost a request ``MAX_TRANSIT_S`` of its budget at most, and never give it time as a
present.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sortserve.core.errors import SortserveError
from sortserve.core.request import (
    AdmissionStats,
    EngineStats,
    Estimate,
    ExitChange,
    Request,
    RequestOutput,
    RequestReport,
)
from sortserve.core.sampling_params import SampledToken
from sortserve.core.schedule import DepthSchedule
from sortserve.replicas.choice import RoutedRequest
from sortserve.replicas.load import EngineLoad

__all__ = [
    "MAX_TRANSIT_S",
    "Accepted",
    "Ask",
    "Handover",
    "Item",
    "Outputs",
    "Refused",
    "ReplicaReport",
    "arrival_at",
    "shifted",
]

MAX_TRANSIT_S = 5.0
"""Most seconds on the way that a replica believes."""


@dataclass(frozen=True, kw_only=True)
class Handover:
    """The sequences of one client's request, on their way to one replica."""

    requests: tuple[Request, ...]
    """Without grammars, which the replica compiles; the samples of each prompt in a row."""
    num_samples: int
    """Of each prompt."""
    routed: RoutedRequest
    """What the choice of the replica goes by."""
    elapsed_s: float
    """From the request's arrival until it was sent, by the router's monotonic clock."""
    sent_unix_s: float
    """Time of day when it was sent."""
    is_streamed: bool = True
    """Whether outputs are sent as they come; else all of them at the end."""
    not_to: frozenset[str] = frozenset()
    """Replicas that have refused it or were lost with it."""
    only: str | None = None
    """Always None: any replica may get it."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A question to one replica, whatever its load."""

    what: str
    """``metrics`` or ``facts``."""
    only: str | None = None
    """Who is asked; None: whoever is there."""
    routed: None = None
    not_to: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Accepted:
    """The first word of a replica that has let the requests in."""

    replica_id: str
    arrival_s: float
    """When the request came to the router, on the replica's clock."""
    choices: tuple[tuple[int, Estimate | None, bool, DepthSchedule | None], ...]
    """Of each sequence: the exit, what was predicted, whether the budget is promised, and the depth
    schedule that the replica chose for it."""


@dataclass(frozen=True)
class Refused:
    """The only word of a replica that has let none of them in."""

    replica_id: str
    error: SortserveError


@dataclass(frozen=True)
class Outputs:
    """What came at once, each with the index of its sequence."""

    outputs: tuple[tuple[int, RequestOutput], ...]
    scored: tuple[tuple[int, Sequence[SampledToken]], ...] = ()
    """Prompts that the model has been asked about, each with the index of its first sequence."""


Item = Accepted | Refused | Outputs


@dataclass(frozen=True, kw_only=True)
class ReplicaReport:
    """How a replica stands, told once or more a second."""

    state: str
    """As ``EngineWorker.state``."""
    load: EngineLoad
    stats: EngineStats
    admission: AdmissionStats
    tokens_by_exit: dict[int, int] = field(default_factory=dict)
    layers: tuple[int, int] = (0, 0)
    """Run, and what full depth would have run."""
    budgets: dict[str, int] = field(default_factory=dict)
    """As ``Totals.budgets``."""

    @property
    def is_accepting(self) -> bool:
        """Whether requests may be sent there."""
        return self.state == "ready" and self.load.is_accepting


def arrival_at(handover: Handover, *, now_s: float, unix_s: float) -> float:
    """When the request came to the router, on the clock of who reads this.

    Args:
        handover: as it arrived.
        now_s: on the reader's monotonic clock.
        unix_s: the reader's time of day.
    """
    transit_s = min(MAX_TRANSIT_S, max(0.0, unix_s - handover.sent_unix_s))
    return now_s - handover.elapsed_s - transit_s


def shifted(output: RequestOutput, by_s: float) -> RequestOutput:
    """The output with the times of its report on a clock that is ahead by ``by_s``."""
    if output.report is None:
        return output
    return replace(output, report=_shifted_report(output.report, by_s))


def _shifted_report(report: RequestReport, by_s: float) -> RequestReport:
    def moved(at_s: float | None) -> float | None:
        return None if at_s is None else at_s + by_s

    changes: tuple[ExitChange, ...] = tuple(
        change._replace(since_s=change.since_s + by_s) for change in report.exit_changes
    )
    return replace(
        report,
        arrival_s=report.arrival_s + by_s,
        first_scheduled_s=moved(report.first_scheduled_s),
        first_token_s=moved(report.first_token_s),
        last_token_s=moved(report.last_token_s),
        finished_s=report.finished_s + by_s,
        exit_changes=changes,
    )
