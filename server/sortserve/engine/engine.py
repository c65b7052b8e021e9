"""The engine: schedule, execute, commit. Read this first."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sortserve.budget import ExitTable, OnMiss
from sortserve.engine.finish import make_report
from sortserve.engine.steps import step_record, step_shape
from sortserve.errors import (
    BudgetUnattainableError,
    EngineError,
    InvalidRequestError,
    SortserveError,
)
from sortserve.outputs import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    Observer,
    RequestOutput,
)
from sortserve.sampling_params import SampledToken
from sortserve.scheduling.admission import ExitChoice
from sortserve.scheduling.cost_learner import CostLearner
from sortserve.scheduling.cost_model import CostModel
from sortserve.scheduling.demand import Demand
from sortserve.scheduling.kv_cache import KVCacheManager
from sortserve.scheduling.lengths import LengthEstimator, expected_tokens
from sortserve.scheduling.plan import StepPlan
from sortserve.scheduling.policy import get_policy
from sortserve.scheduling.scheduler import Scheduler
from sortserve.sequence import Sequence

__all__ = ["Engine", "EngineConfig", "Runner", "TextStream"]

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What executes a plan: weights and KV, no queues."""

    num_pages: int
    block_size: int
    slab_size: int

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """Run the plan; one token for each row that samples, in the plan's order."""


class TextStream(Protocol):
    """Tokens in, text out (see ``sortserve.model.tokenizer.TextStream``)."""

    def push(self, token_id: int) -> tuple[str, bool]:
        """New text, and whether a stop string ended it."""

    def finish(self) -> str:
        """The text held back so far."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits and choices of one engine."""

    max_model_len: int
    """Most tokens of prompt and output together."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 1024
    policy: str = "deadline"
    overload_delay_s: float = 2.0
    """Predicted wait beyond which requests without a budget start shallower; 0: never."""
    enable_prefix_caching: bool = True
    seed: int | None = None
    """Of the generator that draws seeds for requests without one."""


@dataclass(frozen=True)
class _Live:
    """A live request: its sequence, its text, and whether its budget was promised."""

    sequence: Sequence
    text: TextStream
    promised: bool


class Engine:
    """Everything between a request and its tokens; not thread-safe (see ``EngineWorker``).

    Args:
        runner: executes plans.
        exits: the checkpoint's exits.
        eos_token_ids: tokens that end a request unless it ignores them.
        make_text: makes the text stream of a request.
        config: limits and choices.
        clock: the monotonic clock all times are taken from.
        observer: who is told what happens.
    """

    def __init__(
        self,
        runner: Runner,
        exits: ExitTable,
        *,
        eos_token_ids: frozenset[int],
        make_text: Callable[[GenerationRequest], TextStream],
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
    ) -> None:
        self.exits = exits
        self.config = config
        self.clock = clock
        self.observer = observer
        self.learner: CostLearner | None = None
        """Owns the cost model where it is learned from the steps."""
        self.lengths = LengthEstimator()
        self._runner = runner
        self._eos_token_ids = eos_token_ids
        self._make_text = make_text
        self._random = random.Random(config.seed)
        self.kv_cache = KVCacheManager(
            num_pages=runner.num_pages,
            block_size=runner.block_size,
            slab_size=runner.slab_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            self.kv_cache,
            policy=get_policy(config.policy),
            exits=exits.layers,
            cost_of={info.exit_layer: info.compute for info in exits.exits}.__getitem__,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            expect=lambda s: expected_tokens(s.request, s.num_output_tokens, self.lengths),
        )
        self._live: dict[str, _Live] = {}
        # Sequences whose budget may end them while they wait or run.
        self._timed: dict[str, Sequence] = {}
        # When the last step ended, if it left work: the next one's time counts from there.
        self._busy_since_s: float | None = None

    @property
    def cost_model(self) -> CostModel | None:
        """What steps cost; None: nobody knows, and every budget counts as possible."""
        return self.scheduler.cost_model

    @cost_model.setter
    def cost_model(self, model: CostModel | None) -> None:
        self.scheduler.cost_model = model

    def learn_from(self, learner: CostLearner) -> None:
        """Use a learner's cost model, and let it learn from every step."""
        self.learner = learner
        self.cost_model = learner.model

    # ---- the main loop's body ----

    def step(self) -> list[RequestOutput]:
        """Run one step; returns what it added to each request, and the requests it ended."""
        now = self.clock()
        outputs = self._expire(now)
        plan = self.scheduler.schedule(now)
        if plan is None:
            return outputs
        try:
            sampled = self._runner.execute(plan)
        except Exception as error:
            logger.exception("a step failed; its requests are lost")
            return outputs + self._fail(plan, error)
        outputs += self._commit(plan, sampled, now)
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do."""
        return self.scheduler.has_work

    # ---- requests come and go ----

    def validate(self, request: GenerationRequest) -> tuple[int, ...]:
        """Refuse what can never be served; returns the exits the budget allows, ascending.

        Reads only what never changes, so any thread may ask.

        Raises:
            InvalidRequestError: ``param`` names the field.
        """
        num_prompt = len(request.prompt_token_ids)
        limit = self.config.max_model_len
        if num_prompt == 0:
            raise InvalidRequestError("prompt is empty: give at least one token.", param="prompt")
        if num_prompt >= limit:
            raise InvalidRequestError(
                f"prompt has {num_prompt} tokens, but the context holds {limit}, "
                "with at least one for the answer. Shorten it.",
                param="prompt",
            )
        max_tokens = request.sampling.max_tokens
        if num_prompt + max_tokens > limit:
            raise InvalidRequestError(
                f"max_tokens={max_tokens} with a prompt of {num_prompt} tokens exceeds the "
                f"context of {limit}: at most {limit - num_prompt} fit.",
                param="max_tokens",
            )
        allowed = self.exits.allowed(request.budget)
        num_pages = self.kv_cache.pool.num_pages
        fitting = tuple(
            e
            for e in allowed
            if self.kv_cache.num_pages_needed(num_prompt + max_tokens, e) <= num_pages
        )
        if not fitting:
            raise InvalidRequestError(
                f"max_tokens={max_tokens} with a prompt of {num_prompt} tokens needs "
                f"{self.kv_cache.num_pages_needed(num_prompt + max_tokens, allowed[0])} pages of "
                f"KV cache at exit {allowed[0]}; the server has {num_pages}. Ask for fewer tokens "
                "or a shallower exit.",
                param="max_tokens",
            )
        return fitting

    def add_request(self, request: GenerationRequest, choice: ExitChoice) -> None:
        """Queue a validated request at the exit chosen for it."""
        assert request.request_id not in self._live, f"{request.request_id} is live already"
        sampling = request.sampling
        seed = sampling.seed if sampling.seed is not None else self._random.getrandbits(63)
        eos = frozenset() if sampling.ignore_eos else self._eos_token_ids
        sequence = Sequence(
            request,
            exit_layer=choice.exit_layer,
            seed=seed + request.sample_index,
            stop_token_ids=eos | frozenset(sampling.stop_token_ids),
            estimate=choice.estimate,
            floor_layer=choice.floor_layer,
            promise=choice.promise,
        )
        live = _Live(sequence, self._make_text(request), choice.fits)
        self._live[request.request_id] = live
        if request.budget.has_latency and request.budget.on_miss is not OnMiss.DEGRADE:
            self._timed[request.request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free all it holds; None if it is over already."""
        live = self._live.get(request_id)
        if live is None:
            return None
        return self._finish(live, FinishReason.ABORT, self.clock(), text=live.text.finish())

    def go_shallower(self, request_id: str, exit_layer: int, reason: str) -> None:
        """Continue a live request at a shallower exit: free, since all shallower KV exists."""
        sequence = self._live[request_id].sequence
        assert exit_layer in self.exits.layers
        assert exit_layer < sequence.exit_layer
        self.scheduler.go_shallower(sequence, exit_layer, reason)

    # ---- parts of a step ----

    def _expire(self, now: float) -> list[RequestOutput]:
        """End the requests whose budget says that they are not worth running any more."""
        outputs = []
        for sequence in list(self._timed.values()):
            budget, deadlines = sequence.request.budget, sequence.deadlines
            live = self._live[sequence.request_id]
            late_end = deadlines.e2e_s is not None and now >= deadlines.e2e_s
            late_start = deadlines.ttft_s is not None and now >= deadlines.ttft_s
            if budget.on_miss is OnMiss.TRUNCATE and late_end:
                text = live.text.finish()
                outputs.append(self._finish(live, FinishReason.DEADLINE, now, text=text))
            elif (
                budget.on_miss is OnMiss.REJECT
                and sequence.first_scheduled_s is None
                and (late_end or late_start)
            ):
                error = BudgetUnattainableError(
                    "The budget expired in the queue before any compute. Raise it or come back.",
                    param="budget." + ("latency_ms" if late_end else "ttft_ms"),
                    retry_after_s=max(1.0, now - sequence.request.arrival_s),
                )
                outputs.append(self._finish(live, FinishReason.ERROR, now, error=error))
        return outputs

    def _commit(
        self, plan: StepPlan, sampled: list[SampledToken], started: float
    ) -> list[RequestOutput]:
        """Count what ran, hand out the sampled tokens, tell the observer."""
        now = self.clock()
        sequences = {row.request_id: self._live[row.request_id].sequence for row in plan.rows}
        previous = {id_: s.last_token_s for id_, s in sequences.items()}
        self.scheduler.commit(plan, sequences)
        predicted_s = self._predict(plan)
        self._learn(plan, started if self._busy_since_s is None else self._busy_since_s, now)
        tokens = iter(sampled)
        outputs = [
            self._accept(self._live[row.request_id], next(tokens), now)
            for row in plan.rows
            if row.sampling is not None
        ]
        if self.observer is not None:
            record = step_record(
                plan,
                sequences,
                full_depth=self.exits.full,
                previous_token_s=previous,
                started_s=started,
                now=now,
                predicted_s=predicted_s,
            )
            self.observer.on_step(record)
        self._busy_since_s = now if self.has_work else None
        return outputs

    def _learn(self, plan: StepPlan, begun_s: float, now: float) -> None:
        """Refit the cost model; between two steps of a busy engine no time is lost from sight."""
        if self.learner is not None:
            self.learner.observe(step_shape(plan), now - begun_s)
            self.cost_model = self.learner.model

    def _accept(self, live: _Live, token: SampledToken, now: float) -> RequestOutput:
        """Add one token to its request and see whether it ends there."""
        sequence = live.sequence
        previous_s = sequence.last_token_s
        sequence.append_token(token.token_id)
        sequence.last_token_s = now
        if sequence.first_token_s is None:
            sequence.first_token_s = now

        reason: FinishReason | None = None
        text = ""
        if token.token_id in sequence.stop_token_ids:
            reason = FinishReason.STOP
        else:
            text, stopped = live.text.push(token.token_id)
            if stopped:
                reason = FinishReason.STOP
            elif sequence.num_output_tokens >= sequence.request.sampling.max_tokens:
                reason = FinishReason.LENGTH
            elif self._would_overrun(sequence, previous_s, now):
                reason = FinishReason.DEADLINE
        if reason is None:
            return RequestOutput(
                request_id=sequence.request_id,
                text=text,
                tokens=(token,),
                exit_layer=sequence.exit_layer,
            )
        return self._finish(live, reason, now, text=text + live.text.finish(), tokens=(token,))

    def _would_overrun(self, sequence: Sequence, previous_s: float | None, now: float) -> bool:
        """Whether another token would come after the deadline of a request to be truncated."""
        deadline = sequence.deadlines.e2e_s
        if deadline is None or sequence.request.budget.on_miss is not OnMiss.TRUNCATE:
            return False
        gap = now - previous_s if previous_s is not None else 0.0
        return now + gap > deadline

    def _finish(
        self,
        live: _Live,
        reason: FinishReason,
        now: float,
        *,
        text: str = "",
        tokens: tuple[SampledToken, ...] = (),
        error: SortserveError | None = None,
    ) -> RequestOutput:
        sequence = live.sequence
        self.scheduler.finish(sequence)
        if reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE):
            self.lengths.observe(sequence.num_output_tokens, cut=reason is not FinishReason.STOP)
        del self._live[sequence.request_id]
        self._timed.pop(sequence.request_id, None)
        report = make_report(sequence, reason, exits=self.exits, now=now, promised=live.promised)
        if self.observer is not None:
            if isinstance(error, BudgetUnattainableError):
                self.observer.on_rejected("expired_in_queue", sequence.request.budget)
            else:
                self.observer.on_finished(report)
        return RequestOutput(
            request_id=sequence.request_id,
            text=text,
            tokens=tokens,
            exit_layer=sequence.exit_layer,
            finish_reason=reason,
            report=report,
            error=error,
        )

    def _fail(self, plan: StepPlan, cause: Exception) -> list[RequestOutput]:
        """The step did not run: end its requests with an error, keep all others."""
        now = self.clock()
        error = EngineError(f"The model failed on this request: {type(cause).__name__}.")
        return [
            self._finish(self._live[row.request_id], FinishReason.ERROR, now, error=error)
            for row in plan.rows
        ]

    # ---- views ----

    def stats(self) -> EngineStats:
        """The state between two steps."""
        return EngineStats(
            running_by_exit=self.scheduler.running_by_exit(),
            num_waiting=self.scheduler.num_waiting,
            num_waiting_tokens=self.scheduler.num_waiting_tokens,
            kv_pages_used=self.kv_cache.pool.num_used,
            kv_pages_cached=self.kv_cache.pool.num_kept,
            kv_pages_total=self.kv_cache.pool.num_pages,
        )

    def demands(self) -> tuple[Demand, ...]:
        """What every live request still needs; nothing without a cost model."""
        return tuple(self.scheduler.demands(self.clock()))

    def expect(self, request: GenerationRequest) -> int:
        """The output tokens to plan a newcomer for."""
        return expected_tokens(request, 0, self.lengths)

    def _predict(self, plan: StepPlan) -> float | None:
        return None if self.cost_model is None else self.cost_model.step_s(step_shape(plan))

    def check_invariants(self) -> None:
        """Assert that every part agrees with every other."""
        self.scheduler.check_invariants()
        live = {sequence.request_id for sequence in self.scheduler.sequences()}
        assert live == set(self._live)
        assert set(self._timed) <= live
