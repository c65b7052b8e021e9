"""What runs next: admission, depth cap, chunks, preemption. Proposes a plan, executes nothing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from itertools import chain

from sortserve.core.plan import StepPlan
from sortserve.core.sequence import Sequence, Status
from sortserve.cost.costs import Costs
from sortserve.scheduling.columns import LiveDemands
from sortserve.scheduling.decisions import Decisions
from sortserve.scheduling.kv_cache import KVCacheManager
from sortserve.scheduling.launch import Launch, News
from sortserve.scheduling.objective import Worth, share_of_layers
from sortserve.scheduling.policy import Policy, StepChoice
from sortserve.scheduling.rows import row_of

__all__ = ["Scheduler"]


class Scheduler:
    """Owns the two queues; carries out what the policy decides from plain values.

    * ``waiting``: in order of arrival; a preempted sequence returns to the front. Who enters first
      is the policy's choice where it knows times, else first come, first served.
    * ``running``: in order of admission. The first one's pages are never taken away, so it always
      gets on: nobody starves.
    * ``ending``: they hold pages until the step under way has given their last token.

    Args:
        kv_cache: all pages.
        policy: what decides.
        costs: of steps.
        exits: all exit layers, ascending.
        cost_of: relative cost of a step to an exit.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of one step.
        expect: the output tokens to plan for, of a sequence.
        worth: what the objective says of the exits; None: their share of the layers counts.
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
        worth: Worth | None = None,
    ) -> None:
        assert max_num_seqs > 0
        assert max_num_batched_tokens > 0
        self.kv_cache = kv_cache
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._ending: list[Sequence] = []
        self._decisions = Decisions(
            policy,
            running=self._running,
            waiting=self._waiting,
            costs=costs,
            exits=exits,
            cost_of=cost_of,
            max_num_tokens=max_num_batched_tokens,
            expect=expect,
            worth=share_of_layers(exits) if worth is None else worth,
        )
        self._news = News()

    # ---- views ----

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running or self._ending)

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of the sequences without pages."""
        return sum(sequence.num_tokens for sequence in self._waiting)

    def running_by_exit(self) -> dict[int, int]:
        """How many sequences run at each exit."""
        return dict(Counter(s.exit_layer for s in chain(self._running, self._ending)))

    def sequences(self) -> Iterator[Sequence]:
        """All live sequences, running ones first."""
        yield from chain(self._running, self._ending, self._waiting)

    # ---- events ----

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        num_blocks = len(self.kv_cache.match_prefix(sequence))
        sequence.num_found_tokens = num_blocks * self.kv_cache.block_size
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence, *, keep_prefix: bool = True) -> None:
        """Take a sequence out, wherever it is, and free its pages.

        Args:
            sequence: waiting or running.
            keep_prefix: whether others may reuse the blocks that it has computed.
        """
        if sequence.status is Status.RUNNING:
            self._running_or_ending(sequence).remove(sequence)
            if not keep_prefix:
                self.kv_cache.distrust(sequence)
            self.kv_cache.free(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        sequence.num_unknown_tokens = 0  # what is on its way comes too late
        sequence.move_to(Status.FINISHED)

    def go_shallower(self, sequence: Sequence, exit_layer: int, reason: str) -> None:
        """Continue a sequence at a shallower exit; its deep pages are free at once."""
        assert exit_layer < sequence.exit_layer
        assert not sequence.num_unknown_tokens, "a step under way needs its pages"
        self._news.exit_changes.append((sequence.exit_layer, exit_layer, reason))
        if sequence.status is Status.RUNNING:
            self.kv_cache.go_shallower(sequence, exit_layer)
        sequence.go_shallower(exit_layer, reason)

    # ---- one step ----

    def schedule(self, now: float, *, begins_s: float | None = None) -> StepPlan | None:
        """The next step's plan; None if there is nothing to run, or not before this one lands.

        Args:
            now: the engine's clock, in seconds.
            begins_s: when the step can begin, which is when one under way gives its tokens; what
                time there is counts from then. None: now.
        """
        begins_s = now if begins_s is None else begins_s
        for sequence in self._running:
            if sequence.schedule is not None:
                self._follow_schedule(sequence)
        self._decisions.see(begins_s)
        if not self._lower(begins_s):
            return None
        self._admit(begins_s)
        while self._running:
            choice, rows = self._decisions.choose(begins_s)
            rows = self._make_room(rows, begins_s)
            if rows:
                rank = {request_id: i for i, request_id in enumerate(choice.request_ids)}
                rows.sort(key=lambda s: rank[s.request_id])
                return self._plan(rows, choice, now)
            if self._ending:
                break
            # All rows of the step gave up their pages: others have room now.
        return None

    def demands(self, now: float) -> LiveDemands:
        """What every live sequence still needed when the last step was chosen, or needs now."""
        return self._decisions.demands(now)

    def _follow_schedule(self, sequence: Sequence) -> None:
        """Take a sequence to the exit that its schedule has for the next token, never deeper."""
        assert sequence.schedule is not None
        exit_layer = sequence.schedule.exit_at(sequence.num_output_tokens)
        if exit_layer < sequence.exit_layer:
            self.go_shallower(sequence, exit_layer, "schedule")

    def _lower(self, now: float) -> bool:
        """Let the policy take sequences to shallower exits, so that the promises can be kept.

        False if it wants that of one whose step is under way: its pages are needed till that lands.
        """
        lowerings = self._decisions.lowerings(now)
        if any(sequence.num_unknown_tokens for sequence, _ in lowerings):
            return False
        for sequence, exit_layer in lowerings:
            reason = "unpromised" if sequence.promise is None else "behind"
            self.go_shallower(sequence, exit_layer, reason)
        if lowerings:
            self._decisions.look_again([sequence for sequence, _ in lowerings], now)
        return True

    def launch(self, plan: StepPlan, sequences: Mapping[str, Sequence]) -> Launch:
        """The plan runs from now on; what it computes and samples counts for the next one.

        Args:
            plan: what ``schedule`` gave last.
            sequences: of its rows, by request.
        """
        launch, num_sampling = Launch.of(plan, sequences), 0
        for row in plan.rows:
            sequence = sequences[row.request_id]
            sequence.num_computed_tokens += row.num_tokens
            if row.sampling is not None:
                sequence.num_unknown_tokens += 1
                sequence.sampled_at, num_sampling = num_sampling, num_sampling + 1
                if sequence.is_complete:
                    self._running.remove(sequence)
                    self._ending.append(sequence)
        self._decisions.ran({row.exit_layer for row in plan.rows})
        return launch

    def land(self, launch: Launch, ran: StepPlan) -> None:
        """A plan has run. Call before its tokens are appended.

        Args:
            launch: the oldest one under way.
            ran: the plan with the rows that did not fail.
        """
        for row, sequence in launch.live(ran.rows):
            if launch.has_pages_of(sequence):
                self.kv_cache.publish(sequence, row.context_len)

    def undo(self, launch: Launch) -> None:
        """A plan has given nothing: its rows are to be run again, but for those that have ended.

        Args:
            launch: the latest one under way.
        """
        plan = launch.plan
        for row, sequence in launch.live(plan.rows):
            if launch.has_pages_of(sequence):
                sequence.num_computed_tokens -= row.num_tokens
            if row.sampling is not None:
                sequence.num_unknown_tokens -= 1
                if sequence in self._ending:
                    self._ending.remove(sequence)
                    self._running.insert(0, sequence)
            if row.request_id in plan.first_scheduled:
                sequence.first_scheduled_s = None
        self._news.take_from(plan)

    def _admit(self, now: float) -> None:
        if self._waiting and len(self._running) < self._max_num_seqs:
            # Leave every running sequence room to grow by a block, or a newcomer would be
            # preempted as soon as it is admitted.
            spare = sum(self.kv_cache.num_pages_needed(1, s.exit_layer) for s in self._running)
            for sequence in self._decisions.entry_order(now):
                if len(self._running) == self._max_num_seqs or not self._try_admit(sequence, spare):
                    break
                spare += self.kv_cache.num_pages_needed(1, sequence.exit_layer)
                self._decisions.entered(sequence, now)
        if not (self._running or self._ending or any(s.num_unknown_tokens for s in self._waiting)):
            assert not self._waiting, "the engine admits only what fits the pool alone"

    def _try_admit(self, sequence: Sequence, spare: int) -> bool:
        if sequence.num_unknown_tokens:
            return False  # it lost its pages to the step before: its token comes first
        if sequence.schedule is not None:
            self._follow_schedule(sequence)
        if not self.kv_cache.can_admit(sequence, num_spare_pages=spare):
            return False
        self._waiting.remove(sequence)
        sequence.move_to(Status.RUNNING)
        sequence.num_computed_tokens = self.kv_cache.admit(sequence)
        if sequence.first_scheduled_s is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        self._running.append(sequence)
        return True

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
                if self._ending:
                    break  # it waits for their pages, and takes nobody's
                victim = self._victim(sequence, kept, now)
                self.preempt(victim)
                if victim is sequence:
                    break
        return kept

    def _victim(self, needy: Sequence, kept: list[Sequence], now: float) -> Sequence:
        """Whose pages to take: never those of the first admitted, unless it is the needy one."""
        candidates = [s for s in self._running[1:] if s not in kept]
        return self._decisions.victim(candidates, now) if candidates else needy

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it recomputes them when it is admitted again."""
        self._running_or_ending(sequence).remove(sequence)
        self.kv_cache.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.move_to(Status.WAITING)
        self._waiting.appendleft(sequence)
        self._news.num_preemptions += 1

    def _running_or_ending(self, sequence: Sequence) -> list[Sequence]:
        return self._ending if sequence in self._ending else self._running

    def _plan(self, rows: list[Sequence], choice: StepChoice, now: float) -> StepPlan:
        """Share the token budget in the order of the rows; prompts share what they were allowed."""
        left, left_for_prompts = self._max_num_batched_tokens, choice.num_prompt_tokens
        plans, first_scheduled = [], []
        for sequence in rows:
            pending = sequence.num_pending_tokens
            num_tokens = min(pending, left)
            if not sequence.is_decoding:
                num_tokens = min(num_tokens, left_for_prompts)
                left_for_prompts -= num_tokens
            if num_tokens == 0:
                continue
            left -= num_tokens
            table = self.kv_cache.block_table(sequence)
            plans.append(row_of(sequence, num_tokens, table))
            sequence.last_scheduled_s = now
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now
                first_scheduled.append(sequence.request_id)
        assert plans, "a step has at least one row"
        plans.sort(key=lambda row: -row.exit_layer)
        self._news.policy_failed |= self._decisions.take_failed()
        plan = StepPlan(
            rows=tuple(plans), depth_cap=choice.cap, first_scheduled=tuple(first_scheduled)
        )
        return self._news.give_to(plan)

    def check_invariants(self) -> None:
        """Assert that queues, states and pages agree."""
        self.kv_cache.check_invariants()
        assert all(s.status is Status.RUNNING for s in chain(self._running, self._ending))
        assert all(s.is_complete and s.num_unknown_tokens for s in self._ending)
        assert all(0 <= s.num_unknown_tokens <= 2 for s in self.sequences())
        assert all(s.status is Status.WAITING for s in self._waiting)
        for sequence in chain(self._running, self._ending):
            table = self.kv_cache.block_table(sequence)
            assert table.shape[0] == self.kv_cache.slabs.count(sequence.exit_layer)
            assert table.shape[1] * self.kv_cache.block_size >= sequence.num_computed_tokens
            assert sequence.num_computed_tokens < sequence.num_tokens
        for sequence in self._waiting:
            assert sequence.num_computed_tokens == 0
        if not (self._running or self._ending):
            assert self.kv_cache.pool.num_used == 0
