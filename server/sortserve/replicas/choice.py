"""Which replica gets a request: pure, from what the replicas last said (no torch, no clock).

A router never promises anything for a replica. It ranks them; the replica's own admission has the
last word, and what it refuses is sent once more, to the next of the ranking.

For each replica the router works out what admission there would find (``place.py``): the deepest
exit that fits beside what is promised already, what others would lose by making room for it, and
how full the replica would be.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sortserve.replicas.bands import Mix, at_home, row_of
from sortserve.replicas.load import EngineLoad
from sortserve.replicas.place import Place, Prospect, pace_of, token_ms
from sortserve.replicas.routed import RoutedRequest

__all__ = ["MAX_AGE_S", "Candidate", "Choice", "Ranked", "RoutedRequest", "Sent", "choose_replica"]

MAX_AGE_S = 10.0
"""A report that is older says nothing any more."""
SAME_VALUE = 0.02
"""Values that differ by less are the same."""
STEEPNESS = 10.0
"""The time of a machine at pressure p has the price exp(STEEPNESS * (p - 1)): who takes as little
time as it can displaces another answer like it on a full machine, and nobody on an idle one.
(Online routing with exponential prices: Aspnes, Azar, Fiat, Plotkin and Waarts, 1997.)"""
SAME_CROWD = 0.1
"""Crowds that differ by less than one request, or than this share, are the same."""
MAX_PRICED = 2.0
"""A pressure beyond it has no higher price."""


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
    first_load: EngineLoad | None = None
    """Its first report with times. What is learned under load says less well how a step's time
    parts into its depth and its rows, so a replica's place in the row is told by this."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What a request is predicted to get at a replica."""

    replica_id: str
    exit_layer: int | None
    """The deepest exit that fits its budget; None: none does, or nothing is known."""
    gain: float = 0.0
    """What its answer is worth there (score times weight), less what others would lose for it."""
    effort: float = 0.0
    """Time of the machine that it takes there (``Prospect.effort``)."""
    value: float = 0.0
    """The gain, less what that time is worth to others."""
    pressure: float = 0.0
    """Of the replica, with what was sent there since its report, and this request at its floor."""
    ttft_ms: float | None = None
    """Predicted, from now; None: nothing is known."""
    tpot_ms: float | None = None
    num_cached_tokens: int = 0
    """Of its prompt, as far as the report says."""
    is_home: bool = True
    """Whether those who are as hurried go there (``bands.py``)."""
    crowd: int = 0
    """Of a request that bounds no time: the requests that are there, with this one."""
    excess: int = 0
    """By how many steps that is more than at the least crowded replica."""
    is_known: bool = True
    """Whether there is a report to go by."""
    num_ongoing: int = 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """All replicas that take requests, the best first."""

    ranked: tuple[Ranked, ...]

    @property
    def fits(self) -> bool:
        """Whether any replica is predicted to keep the budget, or may, for all that is known."""
        return any(r.exit_layer is not None or not r.is_known for r in self.ranked)


def choose_replica(
    candidates: Sequence[Candidate],
    request: RoutedRequest,
    *,
    now: float,
    mix: Mix | None = None,
    not_to: Collection[str] = (),
) -> Choice:
    """Rank the replicas for a request: where the deepest exit that fits its budget is reachable.

    Of those where an exit fits, the ones come first where the request is at home, with others that
    are as hurried (``bands.py``). Of these the one of most value; of equals the one that has more
    of its prompt in its cache, then the one where its time is worth least to others, which is the
    one with the least pressure if all is alike, then the lower id. What it costs others counts
    against an exit, as it does in admission. A request without a bound on time is at home
    everywhere, and goes to the least crowded. A replica that is not known comes after those where
    the request fits, and before those where it does not. Replicas that take nothing are left out;
    with none left the ranking is empty.

    Args:
        candidates: in any order, ids distinct.
        request: to be sent.
        now: on the router's clock.
        mix: of the requests before; None: everybody is at home everywhere.
        not_to: of the candidates those that are left out, and keep their places in the row.
    """
    ranked = [
        rank(candidate, request, now=now)
        for candidate in candidates
        if (candidate.load is None or candidate.load.is_accepting)
        and candidate.replica_id not in not_to
    ]
    if mix is not None:
        ranked = _homed(ranked, candidates, request, now, mix)
    return Choice(ranked=tuple(sorted(_valued(ranked, request.weight), key=_order)))


def _homed(
    ranked: Sequence[Ranked],
    candidates: Sequence[Candidate],
    request: RoutedRequest,
    now: float,
    mix: Mix,
) -> list[Ranked]:
    """The same, each told whether it is home."""
    firsts = {c.replica_id: c.first_load or c.load for c in candidates}
    loads = {name: load for name, load in firsts.items() if load and load.is_calibrated}
    pace = pace_of(request, loads, now=now)
    place = None if pace is None else mix.place(pace)
    if place is None:
        return list(ranked)
    home = at_home(place, row_of({name: token_ms(load) for name, load in loads.items()}))
    return [replace(r, is_home=r.replica_id in home) for r in ranked]


def _valued(ranked: Sequence[Ranked], weight: float) -> list[Ranked]:
    """The same, each with its value."""
    fitting = [r for r in ranked if r.exit_layer is not None and r.effort > 0.0]
    efforts = [r.effort for r in fitting if r.is_home] or [r.effort for r in fitting]
    least = min(efforts, default=1.0)
    crowd = min((r.crowd for r in ranked if r.is_known), default=0)
    step = max(1.0, SAME_CROWD * crowd)
    return [
        replace(
            r,
            value=r.gain - weight * r.effort / least * _price(r.pressure),
            excess=max(0, int((r.crowd - crowd) / step)),
        )
        for r in ranked
    ]


def _price(pressure: float) -> float:
    return math.exp(STEEPNESS * (min(pressure, MAX_PRICED) - 1.0))


def rank(candidate: Candidate, request: RoutedRequest, *, now: float) -> Ranked:
    """What a request would get at one replica."""
    load, replica_id = candidate.load, candidate.replica_id
    if load is None or candidate.age_s > MAX_AGE_S or not load.is_calibrated:
        return Ranked(
            replica_id=replica_id,
            exit_layer=None,
            is_known=False,
            num_ongoing=candidate.num_ongoing,
        )
    place = Place.of(load, candidate.age_s, now)
    for sent in candidate.sent:
        place.add(sent.request, sent.exit_layer)
    found: Prospect = place.prospect(request)
    return Ranked(
        replica_id=replica_id,
        exit_layer=found.exit_layer,
        gain=found.gain,
        effort=found.effort,
        pressure=found.pressure,
        ttft_ms=1e3 * found.ttft_s,
        tpot_ms=1e3 * found.tpot_s,
        num_cached_tokens=found.num_cached_tokens,
        crowd=0 if request.budget.has_latency else _crowd(load, len(candidate.sent)),
        num_ongoing=candidate.num_ongoing,
    )


def _crowd(load: EngineLoad, num_sent: int) -> int:
    """Where no time is bounded nothing makes pressure: what counts is who is there."""
    return 1 + load.num_running + load.num_waiting + num_sent


def _order(ranked: Ranked) -> tuple[float | int | str, ...]:
    if not ranked.is_known:
        return (1, 0, 0.0, 0, ranked.num_ongoing, ranked.replica_id)
    fits = 0 if ranked.exit_layer is not None else 2
    value = -round(ranked.value / SAME_VALUE)
    times = (ranked.ttft_ms or 0.0, ranked.tpot_ms or 0.0)
    exact = (-ranked.value, ranked.pressure)  # the price of a pressure has a limit
    return (
        fits,
        ranked.excess,
        not ranked.is_home,
        value,
        -ranked.num_cached_tokens,
        *exact,
        *times,
        ranked.replica_id,
    )
