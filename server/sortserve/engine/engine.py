"""The engine: schedule, launch, commit. Read this first."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from sortserve.admission.choose import ExitChoice
from sortserve.admission.lengths import LengthEstimator, expected_tokens
from sortserve.core.budget import ExitTable, OnMiss
from sortserve.core.errors import BudgetUnattainableError, SortserveError
from sortserve.core.plan import Runner
from sortserve.core.request import EngineStats, FinishReason, Observer, Request, RequestOutput
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.core.sequence import Sequence
from sortserve.cost.costs import Costs
from sortserve.cost.model import step_shape
from sortserve.engine.accept import accept, row_failure
from sortserve.engine.config import EngineConfig
from sortserve.engine.finish import (
    expired_in_queue,
    failure_error,
    is_over,
)
from sortserve.engine.health import Health
from sortserve.engine.live import (
    Live,
    TextError,
    TextStream,
    learn_length,
    report_of,
    rest,
    sequence_of,
)
from sortserve.engine.pipeline import Landed, Pipeline
from sortserve.engine.steps import engine_stats, step_record
from sortserve.engine.validation import check_lengths, check_vocabulary, exits_that_fit
from sortserve.scheduling.columns import LiveDemands
from sortserve.scheduling.objective import get_objective
from sortserve.scheduling.policies.table import get_policy
from sortserve.scheduling.scheduler import Scheduler

__all__ = ["Engine", "EngineConfig", "TextStream"]

logger = logging.getLogger(__name__)


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
        self.exits = replace(exits, min_quality=config.min_quality)
        self.config = config
        self.clock = clock
        self.observer = observer
        self.retry_after_s: Callable[[Request], float | None] = lambda request: None
        """Says when one that has expired in the queue should come back."""
        self.num_calls = 0
        """How often the model has been given something to do: any thread may look."""
        self.policy = get_policy(config.policy)
        self.objective = get_objective(config.objective)
        self.costs = Costs()
        """What steps cost: any thread may read its model."""
        self.lengths = LengthEstimator()
        self.runner = runner
        self._eos_token_ids = eos_token_ids
        self._make_text = make_text
        self._random = random.Random(config.seed)
        self.kv_cache = config.make_kv_cache(runner)
        self.scheduler = Scheduler(
            self.kv_cache,
            policy=self.policy,
            costs=self.costs,
            exits=exits.layers,
            cost_of={info.exit_layer: info.compute for info in exits.exits}.__getitem__,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            expect=lambda s: expected_tokens(s.request, s.num_sampled_tokens, self.lengths),
            worth=self.objective.worth(exits),
        )
        self._live: dict[str, Live] = {}
        # Sequences whose budget may end them while they wait or run.
        self._timed: dict[str, Sequence] = {}
        self._pipeline = Pipeline(
            runner,
            self.scheduler,
            overlap=config.async_scheduling,
            sequence_of=lambda request_id: self._live[request_id].sequence,
            on_start=self.count_call,
        )
        # When the last step ended, if it left work: the next one's time counts from there.
        self._busy_since_s: float | None = None
        self._health = Health(
            runner,
            self.kv_cache,
            full_depth=exits.full,
            max_failed_steps=config.max_failed_steps,
            on_start=self.count_call,
        )

    # ---- the main loop's body ----

    def step(self) -> list[RequestOutput]:
        """Run one step; with overlap launch one, and wait for the one before.

        Returns what it added to each request, and the requests it ended.
        """
        now = self.clock()
        outputs = self._expire(now)
        plan = None
        if not self._pipeline.must_land:
            plan = self.scheduler.schedule(now, begins_s=self._next_begins_s(now))
        for landed in self._pipeline.push(plan, now):
            outputs += self._commit(landed)
            self._health.note(landed.execution)
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do."""
        return self.scheduler.has_work or self._pipeline.is_under_way

    def _next_begins_s(self, now: float) -> float:
        """When a step that is planned now can begin: once the one under way is over."""
        flight, model = self._pipeline.flight, self.costs.model
        if flight is None or model is None:
            return now
        begun_s = flight.started_s  # or, if the one before it ended later, then
        if self._busy_since_s is not None:
            begun_s = max(begun_s, self._busy_since_s)
        return max(now, begun_s + model.step_s(step_shape(flight.launch.plan)))

    # ---- requests come and go ----

    def validate(self, request: Request) -> tuple[int, ...]:
        """Refuse what can never be served; returns the exits the budget allows, ascending.

        Reads only what never changes, so any thread may ask.

        Raises:
            InvalidRequestError: ``param`` names the field.
        """
        check_lengths(request, self.config.max_model_len)
        if self.config.vocab_size is not None:
            check_vocabulary(request, self.config.vocab_size, self._eos_token_ids)
        return exits_that_fit(request, self.exits.allowed(request.budget), self.kv_cache)

    def add_request(self, request: Request, choice: ExitChoice) -> None:
        """Queue a validated request at the exit chosen for it."""
        assert request.request_id not in self._live, f"{request.request_id} is live already"
        seed = request.sampling.seed
        seed = self._random.getrandbits(63) if seed is None else seed
        text = self._make_text(request)
        sequence = sequence_of(request, choice, seed=seed, eos_token_ids=self._eos_token_ids)
        sequence.expected_tokens = self.expect(request)
        self.scheduler.add(sequence)
        self._live[request.request_id] = Live(sequence, text, choice.fits)
        if request.budget.has_latency and request.budget.on_miss is not OnMiss.DEGRADE:
            self._timed[request.request_id] = sequence

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free all it holds; None if it is over already."""
        live = self._live.get(request_id)
        if live is None:
            return None
        try:
            text = rest(live)
        except TextError:  # it is cut off in any case
            text = ""
        return self._finish(live, FinishReason.ABORT, self.clock(), text=text)

    # ---- parts of a step ----

    def _expire(self, now: float) -> list[RequestOutput]:
        """End the requests whose budget says that they are not worth running any more."""
        outputs = []
        for request_id, sequence in list(self._timed.items()):
            live = self._live[request_id]
            if is_over(sequence, now):
                outputs.append(self._truncate(live, now))
            elif (error := expired_in_queue(sequence, now, self.retry_after_s)) is not None:
                outputs.append(self._finish(live, FinishReason.ERROR, now, error=error))
        return outputs

    def _truncate(self, live: Live, now: float) -> RequestOutput:
        """End a request at its deadline with what it has."""
        try:
            text = rest(live)
        except TextError as error:
            return self._fail(live, RowFailure("text", error.detail), now)
        return self._finish(live, FinishReason.DEADLINE, now, text=text)

    def _commit(self, landed: Landed) -> list[RequestOutput]:
        """Count what ran, hand out tokens, end what failed, tell the observer."""
        now = self.clock()
        launch, execution = landed.launch, landed.execution
        ran, tokens, failures = execution.plan, landed.tokens(), landed.failures()
        previous = {id_: s.last_token_s for id_, s in launch.sequences.items()}
        self.scheduler.land(launch, ran)
        shape, model = step_shape(ran), self.costs.model  # what the step was planned with
        # Between two steps of a busy engine no time is lost from sight, and none counts twice.
        begun_s = landed.started_s if self._busy_since_s is None else self._busy_since_s
        if not (execution.was_retried or execution.failures):
            self.costs.observe(shape, now - begun_s, now)
        outputs = []
        for row, token in tokens:
            live = self._live[row.request_id]
            try:
                outputs.append(self._accept(live, token, row.exit_layer, now))
            except Exception as error:  # of whatever kind, it is this request's alone
                failures[row.request_id] = row_failure(error, row.request_id)
        outputs += [self._fail(self._live[id_], failure, now) for id_, failure in failures.items()]
        self.tell(
            lambda observer: observer.on_step(
                step_record(
                    ran,
                    launch.sequences,
                    sampled=[row for row, _ in tokens],
                    full_depth=self.exits.full,
                    previous_token_s=previous,
                    num_tokens={output.request_id: len(output.tokens) for output in outputs},
                    started_s=max(landed.started_s, begun_s),
                    now=now,
                    predicted_s=None if model is None else model.step_s(shape),
                    failed_rows=Counter(failure.reason for failure in failures.values()),
                    was_retried=execution.was_retried,
                )
            )
        )
        self._busy_since_s = now if self.has_work else None
        return outputs

    def _accept(
        self, live: Live, token: SampledToken, exit_layer: int, now: float
    ) -> RequestOutput:
        """Add one token, made at an exit, to its request and see whether it ends there."""
        added = accept(live, token, exit_layer, now)
        if added.reason is not None:
            text = added.text + rest(live)
            return self._finish(live, added.reason, now, text=text, tokens=added.tokens)
        return RequestOutput(
            request_id=live.sequence.request_id,
            text=added.text,
            tokens=added.tokens,
            exit_layer=exit_layer,
        )

    def _finish(
        self,
        live: Live,
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
        # Afterwards: a token of a step under way no longer counts.
        report = report_of(live, reason, exits=self.exits, now=now)
        if reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE):
            learn_length(self.lengths, sequence, cut=reason is not FinishReason.STOP)
        del self._live[sequence.request_id]
        self._timed.pop(sequence.request_id, None)
        if isinstance(error, BudgetUnattainableError):
            budget = sequence.request.budget
            self.tell(lambda observer: observer.on_rejected("expired_in_queue", budget))
        elif report is not None:
            told = report
            self.tell(lambda observer: observer.on_finished(told))
        return RequestOutput(
            request_id=sequence.request_id,
            text=text,
            tokens=tokens,
            exit_layer=sequence.exit_layer,
            finish_reason=reason,
            report=report,
            error=error,
        )

    def _fail(self, live: Live, failure: RowFailure, now: float) -> RequestOutput:
        """End a request that the step could not serve."""
        error = failure_error(failure)
        # Scores that are not finite may come from keys and values that are not.
        keep_prefix = failure.reason != "non_finite"
        return self._finish(live, FinishReason.ERROR, now, error=error, keep_prefix=keep_prefix)

    # ---- who watches ----

    def check_health(self) -> None:
        """See whether a step that gave nothing was the engine's fault; call it after each step."""
        if not self._pipeline.is_under_way:
            self._health.check()

    @property
    def failure(self) -> str | None:
        """Why the engine must end; its owner looks after each step."""
        return self._health.failure

    def count_call(self) -> None:
        """The model is given something to do."""
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
        return engine_stats(self.scheduler)

    def demands(self) -> LiveDemands:
        """What every live request still needs; nothing without a cost model."""
        return self.scheduler.demands(self.clock())

    def expect(self, request: Request) -> int:
        """The output tokens to plan a newcomer for."""
        return expected_tokens(request, 0, self.lengths)

    def check_invariants(self) -> None:
        """Assert that every part agrees with every other."""
        self.scheduler.check_invariants()
        live = {sequence.request_id for sequence in self.scheduler.sequences()}
        assert live == set(self._live)
        assert set(self._timed) <= live
