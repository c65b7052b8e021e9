"""The policy is asked here, its answers are checked, and a plain rule stands in for one that fails.

The policy sees plain values, the scheduler deals in sequences and pages; this is the border.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as SequenceOf
from itertools import chain
from typing import TypeVar

from sortserve.core.sequence import Sequence
from sortserve.cost.costs import Costs
from sortserve.scheduling.columns import LiveDemands
from sortserve.scheduling.demand import SOFT_GAP_S, Demand, StepCosts, demand_of
from sortserve.scheduling.failures import FailureLog
from sortserve.scheduling.objective import Worth
from sortserve.scheduling.policies.fair import fair
from sortserve.scheduling.policy import DepthClass, Policy, Situation, StepChoice

__all__ = ["Decisions"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Decisions:
    """What the policy decides of the sequences that run and wait.

    A policy that raises, or that chooses what cannot be run, costs nobody an answer: for that step
    ``fair`` stands in for it, first come, first served, and ``take_failed`` says so.

    Args:
        policy: what decides.
        running: the running sequences, in order of admission: a view, which others change.
        waiting: the waiting ones, in order of arrival, likewise.
        costs: of steps. As long as nothing is known, the policy knows no times: it sets a cap, and
            all else is first come, first served.
        exits: all exit layers, ascending.
        cost_of: relative cost of a step to an exit.
        max_num_tokens: most tokens of one step.
        expect: the output tokens to plan for, of a sequence.
        worth: what the objective says of the exits.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        running: SequenceOf[Sequence],
        waiting: Collection[Sequence],
        costs: Costs,
        exits: SequenceOf[int],
        cost_of: Callable[[int], float],
        max_num_tokens: int,
        expect: Callable[[Sequence], int],
        worth: Worth,
    ) -> None:
        self.policy = policy
        self._running = running
        self._waiting = waiting
        self._costs = costs
        self._exits = tuple(exits)
        self._cost_of = cost_of
        self._max_num_tokens = max_num_tokens
        self._expect = expect
        self._worth = worth
        # Compute time each busy exit has had a part in (see policies.fair).
        self._service: dict[int, float] = {}
        self._oldest_entered_s = -math.inf
        # What the sequences needed when the last step was chosen, and what that step's costs were
        # thought to be; nothing where the policy knows no times.
        self._demands: dict[str, Demand] = {}
        self._step_costs: StepCosts | None = None
        # The last ones that anybody asked for, and when the step was chosen.
        self._live = LiveDemands()
        self._seen_s = math.inf
        # Those who run and share the steps of soft requests.
        self._num_soft = 0
        self._failed = False
        self._failures = FailureLog(
            logger, f"the policy {policy.name} failed: fair stood in for this step"
        )

    def take_failed(self) -> bool:
        """Whether a plain rule has stood in for the policy since this was last asked."""
        failed, self._failed = self._failed, False
        return failed

    def _decide(self, decision: Callable[[], T], stand_in: Callable[[], T], now: float) -> T:
        """What the policy decides; if it fails, what stands in for it."""
        try:
            return decision()
        except Exception as error:
            self._failed = True
            self._failures.add(error, now)
            return stand_in()

    # ---- what the sequences need ----

    def see(self, now: float) -> None:
        """See afresh what the sequences need, before the decisions of a step."""
        lost = {d.request_id for d in self._demands.values() if d.is_lost}
        self._num_soft = sum(s.promise is None or s.request_id in lost for s in self._running)
        self._demands, self._step_costs, self._seen_s = {}, None, now
        model = self._costs.model
        if model is None or not self.policy.uses_times:
            return
        num_decoding = sum(s.is_decoding for s in self._running)
        costs = StepCosts(model, num_rows=num_decoding, chunk=self._max_num_tokens)
        if self._look_at(chain(self._running, self._waiting), costs, now):
            self._step_costs = costs
        else:
            self._demands = {}

    def look_again(self, sequences: Iterable[Sequence], now: float) -> None:
        """See what some sequences need, after something has changed for them."""
        if self._step_costs is not None:
            self._look_at(sequences, self._step_costs, now)

    def demands(self, now: float) -> LiveDemands:
        """What every live sequence still needed when the last step was chosen, or needs now."""
        model = self._costs.model
        if model is None:
            return LiveDemands()
        sequences = [*self._running, *self._waiting]
        unseen = [s for s in sequences if s.request_id not in self._demands]
        self._look_at(unseen, StepCosts(model, chunk=self._max_num_tokens), now)
        known = self._demands
        demands = [known[s.request_id] for s in sequences if s.request_id in known]
        self._live = LiveDemands.after(self._live, demands)
        self._live.as_of_s = self._seen_s
        return self._live

    def _look_at(self, sequences: Iterable[Sequence], costs: StepCosts, now: float) -> bool:
        """Look at sequences; False if that failed: what was known of the others stays."""

        def look() -> bool:
            soft_gap_s = SOFT_GAP_S * max(1, self._num_soft)
            for sequence in sequences:
                self._demands[sequence.request_id] = demand_of(
                    sequence, now=now, expect=self._expect, costs=costs, soft_gap_s=soft_gap_s
                )
            return True

        return self._decide(look, lambda: False, now)

    def _demands_of(self, sequences: Iterable[Sequence]) -> list[Demand]:
        return [self._demands[sequence.request_id] for sequence in sequences]

    # ---- who goes shallower, enters and leaves ----

    def lowerings(self, now: float) -> list[tuple[Sequence, int]]:
        """Who goes shallower so that the promises can be kept, and to which exit."""
        lower, costs = self.policy.lower, self._step_costs
        if lower is None or costs is None:
            return []
        self._live = demands = LiveDemands(self._demands.values())
        return self._decide(
            lambda: self._allowed(lower(demands, self._exits, costs, now, self._worth)),
            lambda: [],
            now,
        )

    def _allowed(self, chosen: SequenceOf[tuple[str, int]]) -> list[tuple[Sequence, int]]:
        """The sequences that were chosen; each of them may go where it is told to."""
        if not chosen:
            return []
        by_id = {s.request_id: s for s in chain(self._running, self._waiting)}
        lowerings = [(by_id.pop(request_id), exit_layer) for request_id, exit_layer in chosen]
        for sequence, exit_layer in lowerings:
            assert exit_layer in self._exits
            assert sequence.floor_layer <= exit_layer < sequence.exit_layer
        return lowerings

    def entry_order(self, now: float) -> list[Sequence]:
        """The waiting sequences in the order in which they should enter."""
        order, costs = self.policy.entry_order, self._step_costs
        if order is None or costs is None or len(self._waiting) < 2:
            return list(self._waiting)
        return self._decide(
            lambda: self._ordered(order(self._demands_of(self._waiting), costs), now),
            lambda: list(self._waiting),
            now,
        )

    def _ordered(self, demands: Iterable[Demand], now: float) -> list[Sequence]:
        """Everybody who waits, as the policy orders them; the oldest that is not due when it may.

        That is once in ``SOFT_GAP_S``, so nobody starves whatever the order. Not due is who was
        promised nothing, whose promise is lost, and whose promise is of a pace alone.
        """
        ordered = list(demands)
        softs = [demand for demand in ordered if not demand.is_hard]
        if softs and now - self._oldest_entered_s >= SOFT_GAP_S:
            oldest = min(softs, key=lambda demand: demand.order)
            ordered.remove(oldest)
            ordered.insert(0, oldest)
        by_id = {sequence.request_id: sequence for sequence in self._waiting}
        sequences = [by_id.pop(demand.request_id) for demand in ordered]
        assert not by_id, "nobody who waits is left out"
        return sequences

    def entered(self, sequence: Sequence, now: float) -> None:
        """A sequence runs that waited before."""
        if not self._is_hard(sequence) and not self._is_passed_over(sequence.request.arrival_s):
            self._oldest_entered_s = now
        self.look_again([sequence], now)

    def _is_passed_over(self, arrival_s: float) -> bool:
        """Whether somebody without a due time waits who came before."""
        return any(not self._is_hard(s) and s.request.arrival_s < arrival_s for s in self._waiting)

    def _is_hard(self, sequence: Sequence) -> bool:
        """Whether its next token was due by a promise when the step was chosen."""
        demand = self._demands.get(sequence.request_id)
        return sequence.promise is not None if demand is None else demand.is_hard

    def victim(self, candidates: SequenceOf[Sequence], now: float) -> Sequence:
        """Whose pages to take, of running sequences in order of admission."""
        choose = self.policy.victim
        if choose is None or self._step_costs is None:
            return candidates[-1]
        by_id = {sequence.request_id: sequence for sequence in candidates}
        return self._decide(
            lambda: by_id[choose(self._demands_of(candidates))], lambda: candidates[-1], now
        )

    # ---- the step ----

    def choose(self, now: float) -> tuple[StepChoice, list[Sequence]]:
        """The policy's next step and its rows as admitted; ``fair`` stands in if it fails."""
        classes = self._depth_classes()
        return self._decide(
            lambda: self._policys_choice(classes, now),
            lambda: self._with_rows(self._all_up_to(fair(classes))),
            now,
        )

    def ran(self, exit_layers: Iterable[int]) -> None:
        """A step has run: these exits have had a part in it."""
        for exit_layer in exit_layers:
            self._service[exit_layer] += self._cost_of(exit_layer)

    def _policys_choice(
        self, classes: list[DepthClass], now: float
    ) -> tuple[StepChoice, list[Sequence]]:
        """What the policy chooses, if a step can be made of it."""
        if self._step_costs is None or self.policy.choose is None:
            choice = self._all_up_to(self.policy.cap(classes))
        else:
            demands = LiveDemands.after(self._live, self._demands_of(self._running))
            costs, most = self._step_costs, self._max_num_tokens
            situation = Situation(now, demands, classes, costs, most)
            choice = self.policy.choose(situation)
        choice, rows = self._with_rows(choice)
        assert rows, "a step has at least one row"
        assert max([s.exit_layer for s in rows]) <= choice.cap, "no row is deeper than the step"
        assert isinstance(choice.num_prompt_tokens, int), "tokens are whole"
        assert choice.num_prompt_tokens > 0 or all(s.is_decoding for s in rows)
        return choice, rows

    def _with_rows(self, choice: StepChoice) -> tuple[StepChoice, list[Sequence]]:
        """A choice and the sequences that it names, in order of admission."""
        chosen = set(choice.request_ids)
        return choice, [s for s in self._running if s.request_id in chosen]

    def _all_up_to(self, cap: int) -> StepChoice:
        """All rows that a cap reaches: those one token from a sample first, then prompts."""
        rows = [s for s in self._running if s.exit_layer <= cap]
        ids = tuple(s.request_id for s in sorted(rows, key=lambda s: not s.is_decoding))
        return StepChoice(cap, ids, self._max_num_tokens)

    def _depth_classes(self) -> list[DepthClass]:
        counts = Counter(sequence.exit_layer for sequence in self._running)
        # A class that becomes busy starts level with the least served: idleness earns no credit.
        level = min((self._service[e] for e in counts if e in self._service), default=0.0)
        self._service = {e: max(self._service.get(e, level), level) for e in counts}
        return [
            DepthClass(e, counts[e], self._cost_of(e), self._service[e])
            for e in sorted(counts, reverse=True)
        ]
