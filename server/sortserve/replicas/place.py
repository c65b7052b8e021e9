"""What one replica would do for a request, worked out from its last report (no torch, no clock).

This is admission (``sortserve.admission.forecast``) seen from afar: the same shares of the machine
from a dozen figures for each exit, instead of from all live requests. A row that decodes with a gap
of g needs 1/g steps a second that reach its exit; steps nest, so only a rate beyond the largest one
costs steps of its own. Prompts must be read by their due times beside that. What is over the whole
machine must be made room for by others that go shallower, at a loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from sortserve.core.errors import InvalidRequestError
from sortserve.replicas.bands import MAX_HURRY, Pace, row_of
from sortserve.replicas.full_batch import FullBatch, OneMore
from sortserve.replicas.load import TYPICAL_TOKENS, EngineLoad, ExitLoad
from sortserve.replicas.routed import RoutedRequest, num_cached_tokens
from sortserve.scheduling.demand import SOFT_GAP_S, plan_pace
from sortserve.scheduling.lowering import MAX_PRESSURE

__all__ = ["Place", "Prospect", "pace_of", "token_ms"]

STALE_S = 5.0
"""What is left of a report's slack shrinks by a factor e in so many seconds."""
EASES = (1.0, 0.6, 0.3)
"""Ways to spread the time, as admission tries them."""
LEAST_TIME_S = 1e-3
LEAST_SHARE = 0.05
"""Of the machine is left for prompts beside all that decode."""


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What a request would get."""

    exit_layer: int | None
    """None: none fits."""
    gain: float
    """Worth of the answer, less what others would lose for it."""
    effort: float
    """Time of the machine that it takes at its floor beside what runs there, over what a typical
    request takes alone: machines of all speeds are measured alike. Of a request that bounds no
    time, all its time."""
    pressure: float
    """With the request at its floor."""
    ttft_s: float
    tpot_s: float
    num_cached_tokens: int


@dataclass(frozen=True)
class _Ask:
    """What a request needs at an exit."""

    index: int
    prompt_s: float
    row_s: float
    due_s: float
    gap_s: float


@dataclass
class Place:
    """A replica as it should be by now: its report, aged, and what was sent since."""

    load: EngineLoad
    now: float
    slack: float
    """Share of the slack that a report of this age is still believed."""
    rates: list[float]
    """Steps a second that reach each exit."""
    decode: float
    """Share of the machine that decoding needs."""
    due: list[tuple[float, float]]
    """(due, work) of prompts, in seconds on the router's clock; not summed."""
    soft_s: float
    full: FullBatch
    """Its course if each step runs everybody."""

    @classmethod
    def of(cls, load: EngineLoad, age_s: float, now: float) -> Place:
        """A report, so much later."""
        made_s = now - age_s
        sums = [(made_s + 1e-3 * due, 1e-3 * work) for due, work in load.due]
        works = itertools.pairwise([(0.0, 0.0), *sums])
        slack = math.exp(-age_s / STALE_S)
        return cls(
            load=load,
            now=now,
            slack=slack,
            full=FullBatch.of(load, slack),
            rates=[own.steps_per_s for own in load.exits],
            decode=load.decode_pressure,
            due=[(due, work - before) for (_, before), (due, work) in works if due > now],
            soft_s=max(0.0, 1e-3 * load.soft_ms - age_s * max(0.0, 1.0 - load.pressure)),
        )

    # ---- what was sent ----

    def add(self, request: RoutedRequest, exit_layer: int | None) -> None:
        """A request is on its way there."""
        try:
            allowed = self.load.table.allowed(request.budget)
        except InvalidRequestError:
            return  # it is refused
        depth = allowed[-1] if exit_layer is None else exit_layer
        index = next((i for i, e in enumerate(self.load.exits) if e.exit_layer >= depth), -1)
        own = self.load.exits[index]
        ask = self._asks(request, own, EASES[0])
        if exit_layer is None or not request.budget.has_latency:
            self.soft_s += ask.prompt_s
        else:
            self.due.append((ask.due_s, ask.prompt_s))
            self.full.add(self._one_more(request, own, ask))
        self.decode += self._more(ask)
        layers = range(self.load.exits.index(own) + 1)
        for i in layers:
            self.rates[i] = max(self.rates[i], 1.0 / ask.gap_s)

    # ---- how a request would use it ----

    def pace(self, request: RoutedRequest) -> Pace | None:
        """How a request uses such a machine; None: it is refused."""
        try:
            allowed = self.load.table.allowed(request.budget)
        except InvalidRequestError:
            return None
        exits = self._open(allowed, request)
        ask = self._asks(request, exits[0], EASES[0])
        return Pace(
            hurry=min(1e-3 * exits[0].step_ms / ask.gap_s, MAX_HURRY),
            work_s=ask.prompt_s + request.num_output_tokens * ask.row_s,
        )

    # ---- what a request would get ----

    def prospect(self, request: RoutedRequest) -> Prospect:
        """The best exit for a request, as admission there would choose."""
        try:
            allowed = self.load.table.allowed(request.budget)
        except InvalidRequestError:
            allowed = ()
        exits = self._open(allowed, request)
        if not exits:
            return _NOWHERE
        floor = best = self._at(exits[0], request)
        for own in reversed(exits[1:]):
            if best.exit_layer is not None and request.weight * own.score <= best.gain:
                break
            found = self._at(own, request)
            if found.exit_layer is not None and (best.exit_layer is None or found.gain > best.gain):
                best = found
        # What a replica can do better must not count against it: the effort is the floor's.
        return replace(best, effort=floor.effort, pressure=floor.pressure)

    def _open(self, allowed: Sequence[int], request: RoutedRequest) -> list[ExitLoad]:
        """The exits that it may get, ascending: of those that are worth the same the shallowest."""
        exits = [own for own in self.load.exits if own.exit_layer in allowed]
        budget = request.budget
        if budget.fixes_depth or not budget.has_latency or not self.load.is_measured:
            return exits
        pairs = itertools.pairwise([-math.inf, *(own.score for own in exits)])
        return [own for own, (below, score) in zip(exits, pairs, strict=True) if score > below]

    def _at(self, own: ExitLoad, request: RoutedRequest) -> Prospect:
        cached = num_cached_tokens(self.load, request, own.exit_layer)
        every = [self._asks(request, own, ease) for ease in EASES]
        asks = [ask for ask in every if self._fits_alone(request, own, ask)] or every[:1]
        shares = [(self._share(ask), ask) for ask in asks]
        # As in admission: the first that can be kept, else the one that needs least.
        fitting = (pair for pair in shares if pair[0] <= MAX_PRESSURE)
        share, ask = next(fitting, min(shares, key=itemgetter(0)))
        times_s = self._times_s(own, ask)
        loss = self._loss(ask, share) if request.budget.has_latency else 0.0
        if loss != 0.0:
            in_full = (ask for ask in asks if self._fits_in_full(request, own, ask))
            found = next(in_full, None)
            loss, ask = (loss, ask) if found is None else (0.0, found)
        fits = loss is not None and self._fits_alone(request, own, ask)
        return Prospect(
            exit_layer=own.exit_layer if fits else None,
            gain=request.weight * own.score - (loss or 0.0),
            effort=self._effort(every[0], request, times_s),
            pressure=min(share for share, _ in shares),
            ttft_s=times_s[0],
            tpot_s=times_s[1],
            num_cached_tokens=cached,
        )

    def _effort(self, ask: _Ask, request: RoutedRequest, times_s: tuple[float, float]) -> float:
        """Time of the machine for it, over that of a typical request alone."""
        num_gaps = max(0, request.num_output_tokens - 1)
        if request.budget.has_latency:
            own_s = ask.prompt_s + num_gaps * ask.gap_s * self._more(ask)
        else:
            own_s = times_s[0] + num_gaps * times_s[1]
        full = self.load.exits[-1]
        token_ms = full.prompt_token_ms + full.step_ms + full.row_ms
        return own_s / (1e-3 * (full.prompt_ms + TYPICAL_TOKENS * token_ms) or 1.0)

    def _times_s(self, own: ExitLoad, ask: _Ask) -> tuple[float, float]:
        """Predicted time to the first token from now, and per token after it."""
        before_s = sum(work for due, work in self.due if due <= ask.due_s)
        if math.isinf(ask.due_s):
            before_s += self.soft_s
        busy_s = 1e-3 * self.load.step_left_ms
        ttft_s = busy_s + (before_s + ask.prompt_s) / max(1.0 - self.decode, LEAST_SHARE)
        if own.ttft_ms is not None and math.isinf(ask.due_s):  # it may have to wait for a slot
            typical_ms = own.prompt_ms + TYPICAL_TOKENS * own.prompt_token_ms
            ttft_s = max(ttft_s, 1e-3 * (own.ttft_ms - typical_ms) + ask.prompt_s)
        tpot_s = 1e-3 * (own.tpot_ms or 0.0)
        return ttft_s, tpot_s if math.isinf(ask.due_s) else min(tpot_s, ask.gap_s)

    def _asks(self, request: RoutedRequest, own: ExitLoad, ease: float) -> _Ask:
        cached = num_cached_tokens(self.load, request, own.exit_layer)
        left = max(1, request.num_prompt_tokens - cached)
        prompt_s = 1e-3 * (own.prompt_ms + left * own.prompt_token_ms)
        row_s = 1e-3 * own.row_ms
        pace = plan_pace(
            request.deadlines,
            now=self.now,
            num_tokens=max(1, request.num_output_tokens),
            prefill_s=prompt_s,
            decode_s=1e-3 * own.step_ms + row_s,
            ease=ease,
        )
        return _Ask(
            index=self.load.exits.index(own),
            prompt_s=prompt_s,
            row_s=row_s,
            due_s=pace.first_due_s,
            gap_s=min(pace.gap_s, SOFT_GAP_S),
        )

    def _fits_alone(self, request: RoutedRequest, own: ExitLoad, ask: _Ask) -> bool:
        """Whether it would be in time with nobody beside it, once the step under way is over."""
        end_s = request.deadlines.e2e_s
        first_s = self.now + 1e-3 * self.load.step_left_ms + ask.prompt_s
        rest_s = (request.num_output_tokens - 1) * (1e-3 * own.step_ms + ask.row_s)
        return first_s <= ask.due_s and (end_s is None or first_s + rest_s <= end_s)

    def _fits_in_full(self, request: RoutedRequest, own: ExitLoad, ask: _Ask) -> bool:
        """Whether all would be in time if each step ran everybody."""
        one = self._one_more(request, own, ask)
        if not self.full.fits(one):
            return False
        # With all others in the step in which it is read.
        read_s = self.now + self.full.busy_s + self.full.first_step_s(one)
        for due_s, work_s in sorted([*self.due, (ask.due_s, one.reading_s)]):
            read_s += work_s
            if read_s > due_s:
                return False
        return True

    def _one_more(self, request: RoutedRequest, own: ExitLoad, ask: _Ask) -> OneMore:
        deadlines, step_s = request.deadlines, 1e-3 * own.step_ms
        num_tokens = max(1, request.num_output_tokens)
        ends_s = [math.inf if deadlines.e2e_s is None else deadlines.e2e_s - self.now]
        if deadlines.tpot_s is not None and num_tokens > 1:  # its first token may come at once
            ends_s.append((num_tokens - 1) * deadlines.tpot_s)
        return OneMore(
            reading_s=max(0.0, ask.prompt_s - step_s),
            row_s=ask.row_s,
            step_s=step_s,
            num_steps=num_tokens,
            end_s=min(ends_s),
        )

    def _more(self, ask: _Ask) -> float:
        """What one more row adds to the share of decoding."""
        rate, steps, before = 1.0 / ask.gap_s, 0.0, 0.0
        for own, present in zip(self.load.exits[: ask.index + 1], self.rates, strict=False):
            step_s = 1e-3 * own.step_ms
            steps += max(0.0, rate - present) * (step_s - before)
            before = step_s
        return steps + rate * ask.row_s

    def _share(self, ask: _Ask, *, at_floors: bool = False) -> float:
        """The share of the machine that is needed with one more request.

        Args:
            ask: what it needs.
            at_floors: if all who were there went as shallow as they may.
        """
        load, more = self.load, self._more(ask)
        pressure, decode = load.pressure, load.decode_pressure
        before = self.decode
        if at_floors:
            before += load.floor_decode_pressure - decode
            pressure, decode = load.floor_pressure, load.floor_decode_pressure
        worst = before + more + max(0.0, pressure - decode)
        if math.isfinite(ask.due_s):
            work_s = ask.prompt_s + sum(work for due, work in self.due if due <= ask.due_s)
            # It decodes only once it has been read.
            worst = max(worst, before + work_s / self._time_s(ask.due_s))
            for due, own in sorted(self.due):
                if due > ask.due_s:
                    work_s += own
                    worst = max(worst, before + more + work_s / self._time_s(due))
        return 1.0 - (1.0 - worst) * self.slack if worst < 1.0 else worst

    def _time_s(self, due_s: float) -> float:
        return max(due_s - self.now - 1e-3 * self.load.busy_ms, LEAST_TIME_S)

    def _loss(self, ask: _Ask, share: float) -> float | None:
        """What others lose by making room, in proportion to it; None: they cannot."""
        if share <= MAX_PRESSURE:
            return 0.0
        least = self._share(ask, at_floors=True)
        if least > MAX_PRESSURE:
            return None
        return self.load.floor_loss * (share - MAX_PRESSURE) / (share - least)


_NOWHERE = Prospect(
    exit_layer=None,
    gain=0.0,
    effort=0.0,
    pressure=math.inf,
    ttft_s=0.0,
    tpot_s=0.0,
    num_cached_tokens=0,
)
"""Of a request that the replica will refuse as invalid."""


def token_ms(load: EngineLoad) -> float:
    """How long a replica takes for a token at full depth: what it is worth beside others."""
    return load.exits[-1].step_ms + load.exits[-1].row_ms


def pace_of(
    request: RoutedRequest, loads: Mapping[str, EngineLoad | None], *, now: float
) -> Pace | None:
    """How a request would use the first of the row of some replicas, whichever it goes to.

    None where it bounds no time, is refused, or nothing is known.
    """
    known = {name: load for name, load in loads.items() if load and load.is_calibrated}
    if not known or not request.budget.has_latency:
        return None
    first = next(iter(row_of({name: token_ms(load) for name, load in known.items()})))
    return Place.of(known[first], 0.0, now).pace(request)
