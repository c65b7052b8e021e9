"""What runs next: admission, depth cap, chunks, preemption. Proposes a plan, executes nothing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator

from sortserve.scheduling.kv_cache import KVCacheManager
from sortserve.scheduling.plan import RowPlan, StepPlan
from sortserve.scheduling.policy import DepthClass, Policy
from sortserve.sequence import Sequence, Status

__all__ = ["Scheduler"]


class Scheduler:
    """Owns the two queues and decides each step from plain values.

    * ``waiting``: first come, first served; a preempted sequence returns to the front.
    * ``running``: in order of admission. Pages are taken away from the last admitted first, so the
      first one always gets on: nobody starves.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        policy: Policy,
        cost_of: Callable[[int], float],
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        assert max_num_seqs > 0
        assert max_num_batched_tokens > 0
        self.kv_cache = kv_cache
        self._policy = policy
        self._cost_of = cost_of
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        # Compute time each busy exit has had a part in (see policy.fair).
        self._service: dict[int, float] = {}
        self.num_preemptions = 0

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

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self.kv_cache.free(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        sequence.move_to(Status.FINISHED)

    def go_shallower(self, sequence: Sequence, exit_layer: int) -> None:
        """Continue a sequence at a shallower exit; its deep pages are free at once."""
        assert exit_layer < sequence.exit_layer
        if sequence.status is Status.RUNNING:
            self.kv_cache.go_shallower(sequence, exit_layer)
        sequence.exit_layer = exit_layer

    # ---- one step ----

    def schedule(self, now: float) -> StepPlan | None:
        """The next step's plan; None if there is nothing to run.

        Args:
            now: the engine's clock, in seconds.
        """
        self._admit()
        while self._running:
            cap = self._choose_cap()
            rows = self._make_room([s for s in self._running if s.exit_layer <= cap])
            if rows:
                return self._plan(rows, cap, now)
            # All rows up to the cap gave up their pages: others have room now.
        return None

    def commit(self, plan: StepPlan, sequences: dict[str, Sequence]) -> None:
        """The plan has run: its tokens have KV now. Call before appending the sampled tokens."""
        for row in plan.rows:
            sequence = sequences[row.request_id]
            sequence.num_computed_tokens += row.num_tokens
            self.kv_cache.publish(sequence)
        for exit_layer in {row.exit_layer for row in plan.rows}:
            self._service[exit_layer] += self._cost_of(exit_layer)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            # Leave every running sequence room to grow by a block, or a newcomer would be
            # preempted as soon as it is admitted.
            spare = sum(self.kv_cache.num_pages_needed(1, s.exit_layer) for s in self._running)
            if not self.kv_cache.can_admit(sequence, num_spare_pages=spare):
                break
            self._waiting.popleft()
            sequence.move_to(Status.RUNNING)
            sequence.num_computed_tokens = self.kv_cache.admit(sequence)
            if sequence.first_scheduled_s is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            self._running.append(sequence)
        assert self._running or not self._waiting, "the engine admits only what fits the pool alone"

    def _choose_cap(self) -> int:
        counts = self.running_by_exit()
        # A class that becomes busy starts level with the least served: idleness earns no credit.
        level = min((self._service[e] for e in counts if e in self._service), default=0.0)
        self._service = {e: max(self._service.get(e, level), level) for e in counts}
        return self._policy(
            [
                DepthClass(e, counts[e], self._cost_of(e), self._service[e])
                for e in sorted(counts, reverse=True)
            ]
        )

    def _make_room(self, rows: list[Sequence]) -> list[Sequence]:
        """Grow each row to hold its known tokens, preempting the last admitted if need be."""
        kept = []
        for sequence in rows:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for a row before it
            while True:
                needed = self.kv_cache.num_pages_to_grow(sequence, sequence.num_tokens)
                if needed <= self.kv_cache.pool.num_free:
                    self.kv_cache.grow(sequence, sequence.num_tokens)
                    kept.append(sequence)
                    break
                victim = self._running[-1]
                self.preempt(victim)
                if victim is sequence:
                    break
        return kept

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it recomputes them when it is admitted again."""
        self._running.remove(sequence)
        self.kv_cache.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.move_to(Status.WAITING)
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _plan(self, rows: list[Sequence], cap: int, now: float) -> StepPlan:
        """Share the token budget: first the rows one token from a sample, then by admission."""
        left = self._max_num_batched_tokens
        plans, first_scheduled = [], []
        for sequence in sorted(rows, key=lambda s: s.num_pending_tokens > 1):
            num_tokens = min(sequence.num_pending_tokens, left)
            if num_tokens == 0:
                break
            left -= num_tokens
            plans.append(self._row(sequence, num_tokens))
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now
                first_scheduled.append(sequence.request_id)
        plans.sort(key=lambda row: -row.exit_layer)
        return StepPlan(rows=tuple(plans), depth_cap=cap, first_scheduled=tuple(first_scheduled))

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
