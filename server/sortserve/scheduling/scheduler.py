"""What runs next: admission, depth cap, chunks, preemption. Proposes a plan, executes nothing."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sequence import Sequence, Status
from sortserve.cost.costs import Costs
from sortserve.scheduling.demand import SOFT_GAP_S, Demand, StepCosts, demand_of
from sortserve.scheduling.failures import FailureLog
from sortserve.scheduling.kv_cache import KVCacheManager
from sortserve.scheduling.policies.fair import fair
from sortserve.scheduling.policy import DepthClass, Policy, Situation, StepChoice

__all__ = ["Scheduler"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Scheduler:
    """Owns the two queues; carries out what the policy decides from plain values.

    * ``waiting``: in order of arrival; a preempted sequence returns to the front. Who enters first
      is the policy's choice where it knows times, else first come, first served.
    * ``running``: in order of admission. The first one's pages are never taken away, so it always
      gets on: nobody starves.

    A policy that raises, or that chooses what cannot be run, costs nobody an answer: for that step
    ``fair`` stands in for it, first come, first served, and the plan says so.

    Args:
        kv_cache: all pages.
        policy: what decides.
        costs: of steps. As long as nothing is known, the policy knows no times: it sets a cap, and
            all else is first come, first served.
        exits: all exit layers, ascending.
        cost_of: relative cost of a step to an exit.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of one step.
        expect: the output tokens to plan for, of a sequence.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        policy: Policy,
        costs: Costs,
        exits: SequenceOf[int],
        cost_of: Callable[[int], float],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        expect: Callable[[Sequence], int] = lambda sequence: sequence.request.sampling.max_tokens,
    ) -> None:
        assert max_num_seqs > 0
        assert max_num_batched_tokens > 0
        self.kv_cache = kv_cache
        self._policy = policy
        self._costs = costs
        self._exits = tuple(exits)
        self._expect = expect
        self._cost_of = cost_of
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        # Compute time each busy exit has had a part in (see policy.fair).
        self._service: dict[int, float] = {}
        self._soft_admitted_s = -math.inf
        # What the sequences needed when the last step was chosen; empty where no times are known.
        self._demands: dict[str, Demand] = {}
        # What has happened since the last plan; the next one carries it.
        self._num_preemptions = 0
        self._exit_changes: list[tuple[int, int, str]] = []
        self._policy_failed = False
        self._failures = FailureLog(
            logger, f"the policy {policy.name} failed: fair stood in for this step"
        )

    # ---- views ----

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Known tokens of the sequences without pages."""
        return sum(sequence.num_tokens for sequence in self._waiting)

    def running_by_exit(self) -> dict[int, int]:
        """How many sequences run at each exit."""
        return dict(Counter(sequence.exit_layer for sequence in self._running))

    def sequences(self) -> Iterator[Sequence]:
        """All live sequences, running ones first."""
        yield from self._running
        yield from self._waiting

    # ---- events ----

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence, *, keep_prefix: bool = True) -> None:
        """Take a sequence out, wherever it is, and free its pages.

        Args:
            sequence: waiting or running.
            keep_prefix: whether others may reuse the blocks that it has computed.
        """
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            if not keep_prefix:
                self.kv_cache.distrust(sequence)
            self.kv_cache.free(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        sequence.move_to(Status.FINISHED)

    def go_shallower(self, sequence: Sequence, exit_layer: int, reason: str) -> None:
        """Continue a sequence at a shallower exit; its deep pages are free at once."""
        assert exit_layer < sequence.exit_layer
        self._exit_changes.append((sequence.exit_layer, exit_layer, reason))
        if sequence.status is Status.RUNNING:
            self.kv_cache.go_shallower(sequence, exit_layer)
        sequence.exit_layer = exit_layer

    # ---- one step ----

    def schedule(self, now: float) -> StepPlan | None:
        """The next step's plan; None if there is nothing to run.

        Args:
            now: the engine's clock, in seconds.
        """
        costs = self._see(now)
        if costs is not None:
            self._lower(costs, now)
        self._admit(costs, now)
        while self._running:
            choice, rows = self._choose(costs, now)
            rows = self._make_room(rows, now)
            if rows:
                rank = {request_id: i for i, request_id in enumerate(choice.request_ids)}
                rows.sort(key=lambda s: rank[s.request_id])
                return self._plan(rows, choice, now)
            # All rows of the step gave up their pages: others have room now.
        return None

    def demands(self, now: float) -> list[Demand]:
        """What every live sequence still needed when the last step was chosen, or needs now."""
        model = self._costs.model
        if model is None:
            return []
        unseen = [s for s in self.sequences() if s.request_id not in self._demands]
        costs = StepCosts(model, chunk=self._max_num_batched_tokens)
        self._look_again(unseen, costs, now)
        known = self._demands
        ids = [s.request_id for s in self.sequences()]
        return [known[request_id] for request_id in ids if request_id in known]

    def _decide(self, decision: Callable[[], T], stand_in: Callable[[], T], now: float) -> T:
        """What the policy decides; if it fails, what stands in for it."""
        try:
            return decision()
        except Exception as error:
            self._policy_failed = True
            self._failures.add(error, now)
            return stand_in()

    def _see(self, now: float) -> StepCosts | None:
        """See afresh what the sequences need; None if the policy does without times."""
        self._demands = {}
        model = self._costs.model
        if model is None or not self._policy.uses_times:
            return None
        num_decoding = sum(s.num_pending_tokens == 1 for s in self._running)
        costs = StepCosts(model, num_rows=num_decoding, chunk=self._max_num_batched_tokens)
        if self._look_again(self.sequences(), costs, now):
            return costs
        self._demands = {}
        return None

    def _look_again(self, sequences: Iterable[Sequence], costs: StepCosts, now: float) -> bool:
        """Look at sequences; False if that failed: what was known of them stays."""

        def look() -> bool:
            self._look_at(sequences, costs, now)
            return True

        return self._decide(look, lambda: False, now)

    def _look_at(self, sequences: Iterable[Sequence], costs: StepCosts, now: float) -> None:
        soft_gap_s = SOFT_GAP_S * max(1, sum(s.promise is None for s in self._running))
        for sequence in sequences:
            self._demands[sequence.request_id] = demand_of(
                sequence, now=now, expect=self._expect, costs=costs, soft_gap_s=soft_gap_s
            )

    def _demands_of(self, sequences: Iterable[Sequence]) -> list[Demand]:
        return [self._demands[sequence.request_id] for sequence in sequences]

    def _lower(self, costs: StepCosts, now: float) -> None:
        """Let the policy take sequences to shallower exits, so that the promises can be kept."""
        lowered: list[Sequence] = []
        for sequence, exit_layer in self._decide(
            lambda: self._lowerings(costs, now), lambda: [], now
        ):
            reason = "unpromised" if sequence.promise is None else "behind"
            self.go_shallower(sequence, exit_layer, reason)
            lowered.append(sequence)
        if lowered:
            self._look_again(lowered, costs, now)

    def _lowerings(self, costs: StepCosts, now: float) -> list[tuple[Sequence, int]]:
        """Who goes shallower, and how far; each of them may."""
        if self._policy.lower is None:
            return []
        chosen = self._policy.lower(list(self._demands.values()), self._exits, costs, now)
        if not chosen:
            return []
        by_id = {sequence.request_id: sequence for sequence in self.sequences()}
        lowerings = [(by_id.pop(request_id), exit_layer) for request_id, exit_layer in chosen]
        for sequence, exit_layer in lowerings:
            assert exit_layer in self._exits
            assert sequence.floor_layer <= exit_layer < sequence.exit_layer
        return lowerings

    def commit(self, plan: StepPlan, sequences: dict[str, Sequence]) -> None:
        """The plan has run: its tokens have KV now. Call before appending the sampled tokens."""
        for row in plan.rows:
            sequence = sequences[row.request_id]
            sequence.num_computed_tokens += row.num_tokens
            self.kv_cache.publish(sequence)
        for exit_layer in {row.exit_layer for row in plan.rows}:
            self._service[exit_layer] += self._cost_of(exit_layer)

    def _admit(self, costs: StepCosts | None, now: float) -> None:
        if len(self._running) < self._max_num_seqs:
            for sequence in self._entry_order(costs, now):
                if len(self._running) == self._max_num_seqs or not self._try_admit(sequence, now):
                    break
                if costs is not None:
                    self._look_again([sequence], costs, now)
        assert self._running or not self._waiting, "the engine admits only what fits the pool alone"

    def _entry_order(self, costs: StepCosts | None, now: float) -> list[Sequence]:
        """The waiting sequences in the order in which they should enter."""
        order = self._policy.entry_order
        if costs is None or order is None or len(self._waiting) < 2:
            return list(self._waiting)
        return self._decide(
            lambda: self._ordered(order(self._demands_of(self._waiting), costs), now),
            lambda: list(self._waiting),
            now,
        )

    def _ordered(self, demands: Iterable[Demand], now: float) -> list[Sequence]:
        """Everybody who waits, as the policy orders them; the oldest soft one when it is its turn.

        It is once in ``SOFT_GAP_S``, so nobody starves whatever the order.
        """
        ordered = list(demands)
        softs = [demand for demand in ordered if not demand.is_hard]
        if softs and now - self._soft_admitted_s >= SOFT_GAP_S:
            oldest = min(softs, key=lambda demand: demand.order)
            ordered.remove(oldest)
            ordered.insert(0, oldest)
        by_id = {sequence.request_id: sequence for sequence in self._waiting}
        sequences = [by_id.pop(demand.request_id) for demand in ordered]
        assert not by_id, "nobody who waits is left out"
        return sequences

    def _try_admit(self, sequence: Sequence, now: float) -> bool:
        # Leave every running sequence room to grow by a block, or a newcomer would be
        # preempted as soon as it is admitted.
        spare = sum(self.kv_cache.num_pages_needed(1, s.exit_layer) for s in self._running)
        if not self.kv_cache.can_admit(sequence, num_spare_pages=spare):
            return False
        self._waiting.remove(sequence)
        sequence.move_to(Status.RUNNING)
        sequence.num_computed_tokens = self.kv_cache.admit(sequence)
        if sequence.first_scheduled_s is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        if sequence.promise is None:
            self._soft_admitted_s = now
        self._running.append(sequence)
        return True

    def _choose(self, costs: StepCosts | None, now: float) -> tuple[StepChoice, list[Sequence]]:
        """The policy's next step and its rows as admitted; ``fair`` stands in if it fails."""
        classes = self._depth_classes()
        return self._decide(
            lambda: self._policys_choice(classes, costs, now),
            lambda: self._with_rows(self._all_up_to(fair(classes))),
            now,
        )

    def _policys_choice(
        self, classes: list[DepthClass], costs: StepCosts | None, now: float
    ) -> tuple[StepChoice, list[Sequence]]:
        """What the policy chooses, if a step can be made of it."""
        if costs is None or self._policy.choose is None:
            choice = self._all_up_to(self._policy.cap(classes))
        else:
            demands, most = self._demands_of(self._running), self._max_num_batched_tokens
            choice = self._policy.choose(Situation(now, demands, classes, costs, most))
        choice, rows = self._with_rows(choice)
        assert rows, "a step has at least one row"
        assert max([s.exit_layer for s in rows]) <= choice.cap, "no row is deeper than the step"
        assert isinstance(choice.num_prompt_tokens, int), "tokens are whole"
        assert choice.num_prompt_tokens > 0 or all(s.num_pending_tokens == 1 for s in rows)
        return choice, rows

    def _with_rows(self, choice: StepChoice) -> tuple[StepChoice, list[Sequence]]:
        """A choice and the sequences that it names, in order of admission."""
        chosen = set(choice.request_ids)
        return choice, [s for s in self._running if s.request_id in chosen]

    def _all_up_to(self, cap: int) -> StepChoice:
        """All rows that a cap reaches: those one token from a sample first, then prompts."""
        rows = [s for s in self._running if s.exit_layer <= cap]
        ids = tuple(s.request_id for s in sorted(rows, key=lambda s: s.num_pending_tokens > 1))
        return StepChoice(cap, ids, self._max_num_batched_tokens)

    def _depth_classes(self) -> list[DepthClass]:
        counts = self.running_by_exit()
        # A class that becomes busy starts level with the least served: idleness earns no credit.
        level = min((self._service[e] for e in counts if e in self._service), default=0.0)
        self._service = {e: max(self._service.get(e, level), level) for e in counts}
        return [
            DepthClass(e, counts[e], self._cost_of(e), self._service[e])
            for e in sorted(counts, reverse=True)
        ]

    def _make_room(self, rows: list[Sequence], now: float) -> list[Sequence]:
        """Grow each row to hold its known tokens, preempting others if need be."""
        kept: list[Sequence] = []
        for sequence in rows:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for a row before it
            while True:
                needed = self.kv_cache.num_pages_to_grow(sequence, sequence.num_tokens)
                if needed <= self.kv_cache.pool.num_free:
                    self.kv_cache.grow(sequence, sequence.num_tokens)
                    kept.append(sequence)
                    break
                victim = self._victim(sequence, kept, now)
                self.preempt(victim)
                if victim is sequence:
                    break
        return kept

    def _victim(self, needy: Sequence, kept: list[Sequence], now: float) -> Sequence:
        """Whose pages to take: never those of the first admitted, unless it is the needy one."""
        candidates = [s for s in self._running[1:] if s not in kept]
        if not candidates:
            return needy
        choose = self._policy.victim
        if choose is None or not self._demands:
            return candidates[-1]
        by_id = {sequence.request_id: sequence for sequence in candidates}
        return self._decide(
            lambda: by_id[choose(self._demands_of(candidates))],
            lambda: candidates[-1],
            now,
        )

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it recomputes them when it is admitted again."""
        self._running.remove(sequence)
        self.kv_cache.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.move_to(Status.WAITING)
        self._waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _plan(self, rows: list[Sequence], choice: StepChoice, now: float) -> StepPlan:
        """Share the token budget in the order of the rows; prompts share what they were allowed."""
        left, left_for_prompts = self._max_num_batched_tokens, choice.num_prompt_tokens
        plans, first_scheduled = [], []
        for sequence in rows:
            pending = sequence.num_pending_tokens
            num_tokens = min(pending, left)
            if pending > 1:
                num_tokens = min(num_tokens, left_for_prompts)
                left_for_prompts -= num_tokens
            if num_tokens == 0:
                continue
            left -= num_tokens
            plans.append(self._row(sequence, num_tokens))
            sequence.last_scheduled_s = now
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now
                first_scheduled.append(sequence.request_id)
        assert plans, "a step has at least one row"
        plans.sort(key=lambda row: -row.exit_layer)
        plan = StepPlan(
            rows=tuple(plans),
            depth_cap=choice.cap,
            first_scheduled=tuple(first_scheduled),
            num_preemptions=self._num_preemptions,
            exit_changes=tuple(self._exit_changes),
            policy_failed=self._policy_failed,
        )
        self._num_preemptions, self._exit_changes, self._policy_failed = 0, [], False
        return plan

    def _row(self, sequence: Sequence, num_tokens: int) -> RowPlan:
        start = sequence.num_computed_tokens
        return RowPlan(
            request_id=sequence.request_id,
            exit_layer=sequence.exit_layer,
            start=start,
            token_ids=sequence.tokens(start, start + num_tokens),
            block_table_SB=self.kv_cache.block_table(sequence),
            sampling=(
                sequence.sampling_row() if num_tokens == sequence.num_pending_tokens else None
            ),
            prompt_len=sequence.num_prompt_tokens,
        )

    def check_invariants(self) -> None:
        """Assert that queues, states and pages agree."""
        self.kv_cache.check_invariants()
        assert all(s.status is Status.RUNNING for s in self._running)
        assert all(s.status is Status.WAITING for s in self._waiting)
        for sequence in self._running:
            table = self.kv_cache.block_table(sequence)
            assert table.shape[0] == sequence.exit_layer // self.kv_cache.slab_size
            assert table.shape[1] * self.kv_cache.block_size >= sequence.num_computed_tokens
            assert sequence.num_computed_tokens < sequence.num_tokens
        for sequence in self._waiting:
            assert sequence.num_computed_tokens == 0
        if not self._running:
            assert self.kv_cache.pool.num_used == 0
