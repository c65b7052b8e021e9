"""The engine: schedule, execute, commit. Read this first."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sortserve.admission.choose import ExitChoice
from sortserve.admission.lengths import LengthEstimator, expected_tokens
from sortserve.core.budget import ExitTable, OnMiss
from sortserve.core.errors import (
    BudgetUnattainableError,
    EngineError,
    InvalidRequestError,
    SortserveError,
)
from sortserve.core.plan import Runner, StepPlan
from sortserve.core.request import (
    EngineStats,
    FinishReason,
    Observer,
    Request,
    RequestOutput,
)
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.core.sequence import Sequence
from sortserve.cost.costs import Costs
from sortserve.cost.model import step_shape
from sortserve.engine.execution import Execution, execute
from sortserve.engine.finish import make_report
from sortserve.engine.selftest import runs_a_token
from sortserve.engine.steps import step_record
from sortserve.engine.vocabulary import check_vocabulary
from sortserve.scheduling.demand import Demand
from sortserve.scheduling.kv_cache import KVCacheManager
from sortserve.scheduling.policies.table import DEFAULT_POLICY, get_policy
from sortserve.scheduling.scheduler import Scheduler

__all__ = ["Engine", "EngineConfig", "TextStream"]

logger = logging.getLogger(__name__)


class TextStream(Protocol):
    """Tokens in, text out (see ``sortserve.text.tokenizer.TextStream``)."""

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
    policy: str = DEFAULT_POLICY
    """Its name in the table of policies."""
    overload_delay_s: float = 2.0
    """Predicted wait beyond which requests without a budget start shallower; 0: never."""
    enable_prefix_caching: bool = True
    max_failed_steps: int = 3
    """So many steps that fail and give no token, nor their self-tests, end the engine."""
    seed: int | None = None
    """Of the generator that draws seeds for requests without one."""
    vocab_size: int | None = None
    """Token ids are below it; None: the caller answers for them."""


@dataclass(frozen=True)
class _Live:
    """A live request: its sequence, its text, and whether its budget was promised."""

    sequence: Sequence
    text: TextStream
    promised: bool


class _TextError(Exception):
    """The text of one request could not be made."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


def _push(live: _Live, token_id: int) -> tuple[str, bool]:
    """The text that a token adds, and whether a stop string ended it."""
    try:
        return live.text.push(token_id)
    except Exception as error:
        logger.exception("the text of request %s failed", live.sequence.request_id)
        raise _TextError(type(error).__name__) from error


def _rest(live: _Live) -> str:
    """The text held back so far."""
    try:
        return live.text.finish()
    except Exception as error:
        logger.exception("the text of request %s lacks its end", live.sequence.request_id)
        raise _TextError(type(error).__name__) from error


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
        make_text: Callable[[Request], TextStream],
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
    ) -> None:
        self.exits = exits
        self.config = config
        self.clock = clock
        self.observer = observer
        self.num_calls = 0
        """How often the model has been given something to do: any thread may look."""
        self.failure: str | None = None
        """Why the engine must end; its owner looks after each step."""
        self.policy = get_policy(config.policy)
        self.costs = Costs()
        """What steps cost: any thread may read its model."""
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
            policy=self.policy,
            costs=self.costs,
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
        self._num_failed_steps = 0
        self._is_suspect = False

    # ---- the main loop's body ----

    def step(self) -> list[RequestOutput]:
        """Run one step; returns what it added to each request, and the requests it ended."""
        now = self.clock()
        outputs = self._expire(now)
        plan = self.scheduler.schedule(now)
        if plan is None:
            return outputs
        execution = execute(self._runner, plan, on_start=self._count_call)
        outputs += self._commit(plan, execution, now)
        # A part of a prompt that has been read says nothing: its scores are not looked at.
        if execution.tokens:
            self._num_failed_steps = 0
        self._is_suspect = bool(execution.failures) and not execution.tokens
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do."""
        return self.scheduler.has_work

    # ---- requests come and go ----

    def validate(self, request: Request) -> tuple[int, ...]:
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
        if self.config.vocab_size is not None:
            check_vocabulary(request, self.config.vocab_size, self._eos_token_ids)
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

    def add_request(self, request: Request, choice: ExitChoice) -> None:
        """Queue a validated request at the exit chosen for it."""
        assert request.request_id not in self._live, f"{request.request_id} is live already"
        sampling = request.sampling
        seed = sampling.seed if sampling.seed is not None else self._random.getrandbits(63)
        eos = frozenset() if sampling.ignore_eos else self._eos_token_ids
        text = self._make_text(request)
        sequence = Sequence(
            request,
            exit_layer=choice.exit_layer,
            seed=seed + request.sample_index,
            stop_token_ids=eos | frozenset(sampling.stop_token_ids),
            estimate=choice.estimate,
            floor_layer=choice.floor_layer,
            promise=choice.promise,
        )
        self.scheduler.add(sequence)
        self._live[request.request_id] = _Live(sequence, text, choice.fits)
        if request.budget.has_latency and request.budget.on_miss is not OnMiss.DEGRADE:
            self._timed[request.request_id] = sequence

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free all it holds; None if it is over already."""
        live = self._live.get(request_id)
        if live is None:
            return None
        try:
            text = _rest(live)
        except _TextError:  # it is cut off in any case
            text = ""
        return self._finish(live, FinishReason.ABORT, self.clock(), text=text)

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
                outputs.append(self._truncate(live, now))
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

    def _truncate(self, live: _Live, now: float) -> RequestOutput:
        """End a request at its deadline with what it has."""
        try:
            text = _rest(live)
        except _TextError as error:
            return self._fail(live, RowFailure("text", error.detail), now)
        return self._finish(live, FinishReason.DEADLINE, now, text=text)

    def _commit(self, plan: StepPlan, execution: Execution, started: float) -> list[RequestOutput]:
        """Count what ran, hand out tokens, end what failed, tell the observer.

        Args:
            plan: what the scheduler proposed.
            execution: what became of it.
            started: when the step began.
        """
        now = self.clock()
        ran, tokens = execution.plan, iter(execution.tokens)
        sequences = {row.request_id: self._live[row.request_id].sequence for row in plan.rows}
        previous = {id_: s.last_token_s for id_, s in sequences.items()}
        self.scheduler.commit(ran, sequences)
        shape, model = step_shape(ran), self.costs.model  # what the step was planned with
        if not (execution.was_retried or execution.failures):
            # Between two steps of a busy engine no time is lost from sight.
            begun_s = started if self._busy_since_s is None else self._busy_since_s
            self.costs.observe(shape, now - begun_s)
        failures = dict(execution.failures)
        outputs = []
        for row in ran.rows:
            if row.sampling is not None:
                live = self._live[row.request_id]
                try:
                    outputs.append(self._accept(live, next(tokens), now))
                except _TextError as error:
                    failures[row.request_id] = RowFailure("text", error.detail)
        outputs += [self._fail(self._live[id_], failure, now) for id_, failure in failures.items()]
        self.tell(
            lambda observer: observer.on_step(
                step_record(
                    ran,
                    sequences,
                    full_depth=self.exits.full,
                    previous_token_s=previous,
                    started_s=started,
                    now=now,
                    predicted_s=None if model is None else model.step_s(shape),
                    failed_rows=Counter(failure.reason for failure in failures.values()),
                    was_retried=execution.was_retried,
                )
            )
        )
        self._busy_since_s = now if self.has_work else None
        return outputs

    def _learn_length(self, sequence: Sequence, *, cut: bool) -> None:
        try:
            self.lengths.observe(sequence.num_output_tokens, cut=cut)
        except Exception:
            logger.exception("nothing was learned of the length of an answer")

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
            text, stopped = _push(live, token.token_id)
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
        return self._finish(live, reason, now, text=text + _rest(live), tokens=(token,))

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
        keep_prefix: bool = True,
    ) -> RequestOutput:
        sequence = live.sequence
        self.scheduler.finish(sequence, keep_prefix=keep_prefix)
        if reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE):
            self._learn_length(sequence, cut=reason is not FinishReason.STOP)
        del self._live[sequence.request_id]
        self._timed.pop(sequence.request_id, None)
        report = make_report(sequence, reason, exits=self.exits, now=now, promised=live.promised)
        if isinstance(error, BudgetUnattainableError):
            budget = sequence.request.budget
            self.tell(lambda observer: observer.on_rejected("expired_in_queue", budget))
        else:
            self.tell(lambda observer: observer.on_finished(report))
        return RequestOutput(
            request_id=sequence.request_id,
            text=text,
            tokens=tokens,
            exit_layer=sequence.exit_layer,
            finish_reason=reason,
            report=report,
            error=error,
        )

    def _fail(self, live: _Live, failure: RowFailure, now: float) -> RequestOutput:
        """End a request that the step could not serve."""
        detail = f" ({failure.detail})" if failure.detail else ""
        error = EngineError(f"The model failed on this request: {failure.reason}{detail}.")
        # Scores that are not finite may come from keys and values that are not.
        keep_prefix = failure.reason != "non_finite"
        return self._finish(live, FinishReason.ERROR, now, error=error, keep_prefix=keep_prefix)

    # ---- failures of whole steps ----

    def check_health(self) -> None:
        """Tell a broken engine from requests that no engine can serve; call it after each step.

        A step in which rows failed and none gave a token is followed by one of a plain token: as
        long as that runs, the requests were to blame, and however many of them come, they end
        nobody but themselves. Otherwise the step counts, and ``failure`` is set when there are too
        many of them before the next token. Where the pages are all taken the step counts for
        nothing: there will be one whose failure has given some back.
        """
        num_pages = self.exits.full // self._runner.slab_size
        if not self._is_suspect or num_pages > self.kv_cache.pool.num_free:
            return
        self._is_suspect = False
        if self._self_test(num_pages):
            self._num_failed_steps = 0
            return
        self._num_failed_steps += 1
        if self._num_failed_steps >= self.config.max_failed_steps:
            self.failure = f"{self._num_failed_steps} steps in a row failed, self-tests included"

    def _self_test(self, num_pages: int) -> bool:
        with self.kv_cache.borrowed(num_pages) as pages:
            self._count_call()
            return runs_a_token(self._runner, self.exits.full, pages)

    def _count_call(self) -> None:
        self.num_calls += 1

    def tell(self, event: Callable[[Observer], None]) -> None:
        """Tell the observer something, on any thread; if it fails, nobody else does."""
        if self.observer is None:
            return
        try:
            event(self.observer)
        except Exception:
            logger.exception("an observer failed")

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

    def expect(self, request: Request) -> int:
        """The output tokens to plan a newcomer for."""
        return expected_tokens(request, 0, self.lengths)

    def check_invariants(self) -> None:
        """Assert that every part agrees with every other."""
        self.scheduler.check_invariants()
        live = {sequence.request_id for sequence in self.scheduler.sequences()}
        assert live == set(self._live)
        assert set(self._timed) <= live
