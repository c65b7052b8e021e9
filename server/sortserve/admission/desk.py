"""Where requests are judged on arrival: which exit, and whether at all (no torch, no queue).

The desk works on the event loop's thread, from the engine's state after its last step and from what
it has let in since (``Seen``), so a refusal never waits for a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

from sortserve.admission.arrival import judge_arrival
from sortserve.admission.choose import ExitChoice, choose_exit, worths
from sortserve.admission.drain import Drains, predicted_drain_s, predicted_places_s, queue_delay_s
from sortserve.admission.forecast import Forecast, forecast
from sortserve.admission.newcomer import newcomer_demand
from sortserve.admission.offered import Offered
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.admission.overload import (
    DepthLevel,
    floor_in_flight,
    may_start_shallower,
    next_level,
)
from sortserve.admission.plans import scheduled_plans
from sortserve.admission.question import Question
from sortserve.admission.room import Room
from sortserve.admission.seen import Seen
from sortserve.admission.typical import typical_request
from sortserve.core.budget import Budget, ExitTable, OnMiss
from sortserve.core.errors import SortserveError
from sortserve.core.request import AdmissionStats, Estimate, Request
from sortserve.core.schedule import DepthSchedule
from sortserve.cost.costs import Costs
from sortserve.cost.model import CostModel
from sortserve.scheduling.capacity import pressure
from sortserve.scheduling.columns import LiveDemands
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.failures import FailureLog
from sortserve.scheduling.objective import Objective, Worth
from sortserve.scheduling.policy import Policy

__all__ = ["AdmissionDesk"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class AdmissionDesk:
    """Judges newcomers by the load they would meet.

    A forecast that raises refuses nobody: the request gets the deepest exit that its budget allows,
    and no promise, as if nothing had been calibrated.
    """

    exits: ExitTable
    policy: Policy
    objective: Objective
    max_num_batched_tokens: int
    overload_delay_s: float
    """Predicted wait beyond which newcomers that may be made shallower start so; 0: never."""
    clock: Callable[[], float]
    expect: Callable[[Request], int]
    """The output tokens to plan a request for."""
    costs: Costs
    held: Callable[[Request], Mapping[int, int]] = lambda request: {}
    """Leading tokens of a prompt that the prefix cache holds, by exit."""
    busy_until_s: Callable[[], float] = lambda: -math.inf
    """When what the engine does for no request should be over."""
    overload_degrade: bool = False
    """Whether requests without a budget may be made shallower for the sake of others."""
    on_failure: Callable[[], None] = lambda: None
    """Told of each forecast that raised."""
    _seen: Seen = field(default_factory=Seen)
    # Event loop only:
    _level: DepthLevel = field(default_factory=DepthLevel)
    _drains: Drains = field(default_factory=Drains)
    _offered: Offered = field(default_factory=Offered)
    _outlook: Outlook | None = None
    """The last one: what it worked out holds until the load changes."""
    _failures: FailureLog = field(
        default_factory=lambda: FailureLog(
            logger, "a forecast failed: nothing was promised where it was asked for"
        )
    )

    # ---- the engine's thread ----

    def see(
        self, demands: tuple[Demand, ...], taken: Iterable[str] = (), room: Room | None = None
    ) -> None:
        """The engine's present state, as far as it looks at it (see ``Seen.show``)."""
        as_of_s = demands.as_of_s if isinstance(demands, LiveDemands) else math.inf
        self._seen.show(demands, taken, room, as_of_s=min(as_of_s, self.clock()))

    # ---- the event loop's thread ----

    def choose(
        self,
        request: Request,
        allowed: tuple[int, ...],
        *,
        exit_layer: int | None = None,
        num_sequences: int = 1,
    ) -> ExitChoice:
        """The exit a request gets.

        Args:
            request: validated.
            allowed: the exits its budget allows, ascending.
            exit_layer: where it must start, as one of several that all fit there; None: the best.
            num_sequences: so many like it come at once, and all must fit.

        Raises:
            BudgetUnattainableError: none fits and the budget says reject.
        """
        in_flight = self.objective.open_in_flight(allowed)
        allowed = self._open_to(allowed, request.budget)
        starts = allowed if exit_layer is None else (exit_layer,)
        deepest = ExitChoice(starts[-1], None, fits=True)
        unpromised = ExitChoice(starts[-1], None, fits=not request.budget.has_latency)
        num_others = num_sequences - 1 if exit_layer is None else 0

        def judge(model: CostModel) -> ExitChoice:
            newcomer = self._newcomer(request, allowed[0])
            if exit_layer is not None:  # charged and noted with all that come with it
                newcomer = replace(newcomer, may_be_refused=False)
            asked = Question(request, newcomer, allowed, starts, num_sequences, num_others)
            load = self.load()
            # Who has nothing to be taken off need not look at the queue while nobody has.
            if self._level.num_down or self._may_start_shallower(request):
                self._level = self._next_level(load, model)
            judge_with = partial(self._judge, asked, level=self._level, model=model)
            if exit_layer is not None:
                return judge_with(load)
            return judge_arrival(
                *(asked, load, judge_with, self._offered), model=model, worth=self._worth
            )

        choice = self._ask(judge, unknown=deepest, failed=unpromised)
        floor_layer = floor_in_flight(
            *(request, choice.exit_layer, in_flight),
            exits=self.exits.layers,
            overload_degrade=self.overload_degrade,
        )
        return replace(choice, floor_layer=floor_layer)

    def _judge(
        self, asked: Question, load: Load, level: DepthLevel, model: CostModel
    ) -> ExitChoice:
        """The exit for a question; nothing changes."""
        request, starts, floor_layer = asked.request, asked.starts, asked.allowed[0]
        newcomer, weight = asked.newcomer, asked.weight
        outlook = self._outlook_on(load, model, asked.allowed)

        def predict(exit_layer: int, newcomer: Newcomer = newcomer, *, limit: float) -> Forecast:
            return forecast(exit_layer, newcomer, outlook, limit=limit)

        if self._may_start_shallower(request):
            starts = level.up_to(starts, self.exits.layers)
        values = worths(starts, self._worth, weight, newcomer.mean)
        plans = scheduled_plans(
            *(request, newcomer),
            starts=starts,
            allowed=asked.allowed,
            worth=self._worth,
            weight=weight,
            predict=predict,
        )

        def drain_s() -> float | None:
            # Who comes back has all its time again.
            again = self._newcomer(replace(request, arrival_s=load.now), floor_layer)
            again = replace(again, num_siblings=asked.num_sequences - 1)
            drain = partial(
                predicted_drain_s, *(floor_layer, again, load, model), limit=values[starts[0]]
            )
            return self._drains.ask(
                floor_layer, again, load.now, lambda: self._attempt(drain, None)
            )

        return choose_exit(
            request.budget, starts, predict, worth=values, schedules=plans, drain_s=drain_s
        )

    def _ask(self, question: Callable[[CostModel], T], *, unknown: T, failed: T) -> T:
        """What the cost model says to a question; what can be said without one, or if it fails."""
        model = self.costs.model
        return unknown if model is None else self._attempt(lambda: question(model), failed)

    def _attempt(self, predict: Callable[[], T], otherwise: T) -> T:
        """What a forecast says; if it fails, what can be said without one."""
        try:
            return predict()
        except SortserveError:
            raise  # a refusal is an answer
        except Exception as error:
            self._failures.add(error, self.clock())
            self.on_failure()
            return otherwise

    def enter(self, request: Request, choice: ExitChoice) -> None:
        """The request is on its way to the engine, at the exit chosen for it."""
        floor = choice.exit_layer if choice.floor_layer is None else choice.floor_layer
        demand = self._attempt(
            lambda: newcomer_demand(
                choice.exit_layer,
                self._newcomer(request, floor, choice.schedule),
                choice.promise,
                now=self.clock(),
                request_id=request.request_id,
            ),
            None,
        )
        if demand is not None:
            self._seen.enter(demand)

    def load(self) -> Load:
        """What a newcomer would meet now."""
        demands, columns, room, seen_s = self._seen.all()
        now = self.clock()
        return Load(
            now=now,
            demands=demands,
            columns=columns,
            room=room,
            seen_s=seen_s,
            policy=self.policy,
            max_num_batched_tokens=self.max_num_batched_tokens,
            worth=self._worth.tokens,
            busy_until_s=self.busy_until_s(),
            offered=self._offered.load(now),
        )

    def look(self, question: Callable[[Outlook | None], T]) -> T:
        """What a question makes of that and the costs; of None, where they fail or are unknown."""
        blind, also = question(None), self.exits.layers
        return self._ask(
            lambda m: question(self._outlook_on(self.load(), m, also)), unknown=blind, failed=blind
        )

    @cached_property
    def _worth(self) -> Worth:
        return self.objective.worth(self.exits)

    def estimate(self, exit_layer: int, num_prompt_tokens: int, max_tokens: int) -> Estimate | None:
        """Predicted times of an unbudgeted newcomer now; None before calibration."""

        def predict(model: CostModel) -> Estimate | None:
            load = self.load()
            newcomer = Newcomer(
                num_prompt_tokens=num_prompt_tokens,
                num_output_tokens=max_tokens,
                arrival_s=load.now,
            )
            outlook = self._outlook_on(load, model, (exit_layer,))
            return forecast(exit_layer, newcomer, outlook).estimate

        return self._ask(predict, unknown=None, failed=None)

    def retry_after_s(self, request: Request) -> float | None:
        """Predicted seconds until a request that has lost its time would fit. Any thread."""

        def predict(model: CostModel) -> float | None:
            load = self.load()
            others = [d for d in load.demands if d.request_id != request.request_id]
            allowed = self._open_to(self.exits.allowed(request.budget), request.budget)
            again = self._newcomer(replace(request, arrival_s=load.now), allowed[0])
            limit = worths(allowed, self._worth, request.weight, again.mean)[allowed[0]]
            beside = load.with_demands(others)
            return predicted_drain_s(allowed[0], again, beside, model, limit=limit)

        return self._ask(predict, unknown=None, failed=None)

    def places_s(self, num_requests: int, num_tokens: int) -> float:
        """Predicted seconds until so many requests and prompt tokens have left the queue."""
        places = num_requests, num_tokens
        return self._ask(
            lambda m: predicted_places_s(*places, self.load(), m), unknown=0.0, failed=0.0
        )

    def stats(self, budget: Budget) -> AdmissionStats:
        """How things stand now; nothing changes.

        Args:
            budget: of requests that give none.
        """
        allowed = self._open_to(self.exits.allowed(budget), budget)
        known = AdmissionStats(min_quality=self.exits.min_quality, default_exit_layer=allowed[-1])
        return self._ask(
            lambda model: self._stats(budget, allowed, known, model), unknown=known, failed=known
        )

    def _stats(
        self, budget: Budget, allowed: tuple[int, ...], known: AdmissionStats, model: CostModel
    ) -> AdmissionStats:
        load, request = self.load(), typical_request(budget, self.clock())
        level = self._next_level(load, model)
        num_decoding = sum(d.is_decoding for d in load.demands)
        costs = StepCosts(model, num_rows=num_decoding, chunk=load.max_num_batched_tokens)
        asked = Question(request, self._newcomer(request, allowed[0]), allowed, allowed)
        choice = self._judge(asked, load, level, model)
        return replace(
            known,
            pressure=pressure(load.demands, costs, now=load.now),
            overload_level=level.num_down,
            default_exit_layer=choice.exit_layer,
        )

    def _open_to(self, allowed: tuple[int, ...], budget: Budget) -> tuple[int, ...]:
        return self.objective.open_to(allowed, self.exits, budget)

    def _may_start_shallower(self, request: Request) -> bool:
        return may_start_shallower(request, overload_degrade=self.overload_degrade)

    def _next_level(self, load: Load, model: CostModel) -> DepthLevel:
        return next_level(
            self._level,
            queue_delay_s=queue_delay_s(load, model),
            limit_s=self.overload_delay_s,
            num_exits=len(self.exits.layers),
            now=load.now,
        )

    def _outlook_on(self, load: Load, model: CostModel, also: tuple[int, ...]) -> Outlook:
        last = self._outlook
        self._outlook = Outlook(load, model, also) if last is None else last.at(load, model, also)
        return self._outlook

    def _newcomer(
        self, request: Request, floor_layer: int, schedule: DepthSchedule | None = None
    ) -> Newcomer:
        return Newcomer(
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=self.expect(request),
            arrival_s=request.arrival_s,
            deadlines=request.budget.deadlines(request.arrival_s),
            floor_layer=floor_layer,
            weight=request.weight,
            schedule=schedule or request.budget.schedule,
            num_scored=request.num_scored_tokens,
            cached=self.held(request),
            may_be_refused=request.budget.on_miss is OnMiss.REJECT,
        )
