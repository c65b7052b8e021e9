"""The engine on a thread of its own, and its front for the event loop.

The event loop never waits for the engine and the engine never waits for a client: requests and
aborts go in through a queue, a step's outputs come out through one ``call_soon_threadsafe`` per
event loop, and each stream buffers only its own tokens.

The package says what two threads touch, and what makes it safe.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from sortserve.admission.queue_limits import QueueLimits, Reservation
from sortserve.core.budget import Budget, ExitTable
from sortserve.core.errors import EngineError, OverloadedError
from sortserve.core.request import AdmissionStats, EngineStats, Estimate, Request, RequestOutput
from sortserve.engine.crowd import Crowds
from sortserve.engine.desk import Reception, room_of
from sortserve.engine.engine import Engine
from sortserve.engine.ledger import Abort, Ledger, State, Submission, waiting_in
from sortserve.engine.stall import start_watchdog
from sortserve.engine.stream import RequestStream
from sortserve.replicas.load import EngineLoad
from sortserve.scheduling.demand import Demand

__all__ = ["EngineWorker", "RequestStream"]

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.5
STOP_TIMEOUT_S = 5.0
"""Seconds that the step under way gets to end when the server does."""


class EngineWorker(Crowds):
    """Runs an engine on its own thread. All public methods are for the event loop's thread.

    Args:
        engine: nobody else may touch it once the worker runs.
        max_num_queued_reqs: most requests that wait.
        max_num_queued_tokens: most prompt tokens that wait.
        step_timeout_s: an engine that does not get on for so long has failed; None: never.
        debug: check the engine's invariants whenever it has nothing left to do.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_num_queued_reqs: int = 512,
        max_num_queued_tokens: int = 200_000,
        step_timeout_s: float | None = None,
        debug: bool = False,
    ) -> None:
        super().__init__()
        self._engine = engine
        self.clock = engine.clock
        self.exits: ExitTable = engine.exits
        self.max_model_len = engine.config.max_model_len
        self._limits = QueueLimits(
            max_requests=max_num_queued_reqs, max_tokens=max_num_queued_tokens
        )
        self._step_timeout_s = step_timeout_s
        self._debug = debug
        self._inbox: queue.SimpleQueue[Submission | Abort | None] = queue.SimpleQueue()
        self._stats = engine.stats()
        self._reception = reception = Reception(engine)
        self._desk, self._prober = reception.desk, reception.prober
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._ledger = Ledger()
        # Engine thread only:
        self._taken: list[str] = []
        self._is_blind = False
        # Written by the engine's thread, read by the watchdog:
        self._num_turns = 0
        self._is_working = False

    # ---- life ----

    @property
    def state(self) -> State:
        """loading, ready, draining, failed or stopped."""
        return self._ledger.state

    @property
    def failure(self) -> str | None:
        """Why the worker has failed; None as long as it has not."""
        return self._ledger.failure

    def start(self, prepare: Callable[[], None] | None = None) -> None:
        """Start the thread; returns when the worker is ready.

        Args:
            prepare: run on the engine's thread first, such as calibration: what warms up there
                (thread pools, memory) is warm for the first request. Its exception is raised here.
        """
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(prepare, ready), name="engine", daemon=True
        )
        self._thread.start()
        ready.result()
        if self._step_timeout_s is not None:
            start_watchdog(
                self._step_timeout_s,
                pulse=self._pulse,
                on_stall=partial(
                    self.fail, f"the engine has not got on for {self._step_timeout_s:g} s"
                ),
                ended=self._stopping,
            )

    async def drain(self, timeout_s: float) -> bool:
        """Take no new work, let live requests finish, end the rest; True if none had to be.

        Takes ``timeout_s`` and ``STOP_TIMEOUT_S`` at most.
        """
        self._ledger.move("draining", of=("ready",))
        deadline = self.clock() + timeout_s
        while not self._ledger.is_idle and self.state != "failed" and self.clock() < deadline:
            await asyncio.sleep(0.02)
        clean = self._ledger.is_idle and self.state != "failed"
        return await asyncio.to_thread(self.stop, STOP_TIMEOUT_S) and clean

    def stop(self, timeout_s: float | None = None) -> bool:
        """Abort what lives (each request gets its last output) and end the thread. Idempotent.

        Args:
            timeout_s: how long the step under way may take to end; None: as long as it likes.

        Returns:
            Whether it ended. If not, its requests have got an error, and only the process ends it.
        """
        self._ledger.move("draining", of=("loading", "ready", "stopped"))
        self._stopping.set()
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self.fail(f"the step under way did not end within {timeout_s:g} s of the stop")
                return False
        self._ledger.move("stopped", of=("draining",))
        return True

    # ---- requests ----

    def reserve(self, num_requests: int, num_tokens: int) -> Reservation:
        """Take places in the queue, before tokenisation.

        Raises:
            InvalidRequestError: more requests at once than the queue can ever hold.
            OverloadedError: the queue is full; 429 with Retry-After.
            UnavailableError: loading, draining or failed; 503.
        """
        self._ledger.require_accepting()
        try:
            return self._limits.reserve(num_requests, num_tokens, retry_after_s=self._desk.places_s)
        except OverloadedError:
            self._reception.rejected("queue_full")
            raise

    def exit_for(self, request: Request, num_sequences: int) -> int:
        """The exit at which so many like this one could start together now; nothing is queued.

        Args:
            request: the one of them that needs most.
            num_sequences: how many there are.

        Raises:
            SortserveError: as ``submit``.
        """
        self._ledger.require_accepting()
        return self._reception.choose(request, num_sequences=num_sequences).exit_layer

    def submit(
        self,
        request: Request,
        reservation: Reservation | None = None,
        *,
        exit_layer: int | None = None,
        num_sequences: int = 1,
    ) -> RequestStream:
        """Validate, choose the exit, queue; nothing runs yet. Needs a running event loop.

        Args:
            request: what to generate; its id must not be live.
            reservation: places taken by ``reserve``, of which this request takes one.
            exit_layer: where it must start, as ``exit_for`` said; None: the best exit for it.
            num_sequences: as ``exit_for`` was told, of which this is one.

        Raises:
            InvalidRequestError: it can never be served; ``param`` names the field.
            BudgetUnattainableError: no exit fits and the budget says reject.
            UnavailableError: loading, draining or failed.
        """
        self._ledger.require_accepting()
        num_prompt = len(request.prompt_token_ids)
        choice = self._reception.choose(request, exit_layer=exit_layer, num_sequences=num_sequences)
        place = (reservation or self.reserve(1, num_prompt)).take_one(num_prompt)
        stream = RequestStream(request.request_id, self._request_abort, choice)
        submission = Submission(request, choice, stream, place)
        try:
            self._ledger.accept(lambda: self._send_in(submission))
        except BaseException:
            place.release()
            raise
        return stream

    def _send_in(self, submission: Submission) -> None:
        self._desk.enter(submission.request, submission.choice)
        self._inbox.put(submission)

    def estimate(self, exit_layer: int, num_prompt_tokens: int, max_tokens: int) -> Estimate | None:
        """Predicted times of a newcomer at an exit now; None before calibration."""
        return self._desk.estimate(exit_layer, num_prompt_tokens, max_tokens)

    def admission_stats(self, budget: Budget) -> AdmissionStats:
        """What a newcomer would meet now; ``budget`` is that of requests that give none."""
        return self._desk.stats(budget)

    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self._stats

    def load(self) -> EngineLoad:
        """What this engine says of itself to those who could send it requests."""
        return self._reception.load(self._stats, is_accepting=self.state == "ready")

    def _request_abort(self, request_id: str) -> None:
        self._inbox.put(Abort(request_id))

    # ---- the engine's thread ----

    def _run(self, prepare: Callable[[], None] | None, ready: Future[None]) -> None:
        try:
            if prepare is not None:
                prepare()
        except BaseException as error:
            ready.set_exception(error)
            return
        self._ledger.move("ready", of=("loading",))
        self._is_working = True
        ready.set_result(None)
        try:
            while not self._stopping.is_set():
                self._turn()
            if self.state != "failed":
                self._abort_all()
        except BaseException as error:  # whatever it is, nobody may wait for this thread any more
            logger.exception("the engine stopped on an error of its own")
            self.fail(f"{type(error).__name__}: {error}")

    def _turn(self) -> None:
        """Take what has come, and run a step if there is anything to run."""
        if self._debug and not self._engine.has_work:
            self._engine.check_invariants()
        self._drain_inbox(wait=not self._engine.has_work)
        self._num_turns += 1
        if self._engine.has_work:
            self._publish(self._engine.step())
            self._engine.check_health()
            self._prober.note_work()
        else:
            self._prober.run(lambda: not self._inbox.empty())
        if self._engine.failure is not None:
            self.fail(self._engine.failure)

    def _abort_all(self) -> None:
        """The last turn: every request that lives gets its last output."""
        self._drain_inbox(wait=False)
        aborted = [self._engine.abort(request_id) for request_id in self._ledger.live_ids()]
        self._publish([output for output in aborted if output is not None])
        if self._engine.has_work:  # a step under way, for nobody
            self._engine.step()

    def _drain_inbox(self, *, wait: bool) -> None:
        idle_s = min(IDLE_POLL_S, max(0.0, self._prober.due_s() - self.clock()))
        while True:
            self._is_working = not wait
            try:
                message = self._inbox.get(timeout=idle_s) if wait else self._inbox.get_nowait()
            except queue.Empty:
                break
            finally:
                self._is_working = True
            wait = False
            if isinstance(message, Submission):
                self._take(message)
            elif isinstance(message, Abort):
                output = self._engine.abort(message.request_id)
                if output is not None:
                    self._publish([output])
        if self._taken:  # they count as the engine's from here on
            self._see()

    def _take(self, submission: Submission) -> None:
        """Give a request to the engine; one that it cannot take is answered, and harms no other."""
        request_id = submission.request.request_id
        if not self._ledger.take(submission):
            return
        self._taken.append(request_id)
        try:
            self._engine.add_request(submission.request, submission.choice)
        except Exception:
            logger.exception("the engine could not take request %s", request_id)
            error = EngineError("The engine could not take this request.")
            self._publish([RequestOutput(request_id=request_id, error=error)])

    def _see(self) -> None:
        """Make the engine's present state visible to the event loop."""
        demands: tuple[Demand, ...] = ()
        try:
            self._stats = self._engine.stats()
            demands = self._engine.demands()
            self._is_blind = False
        except Exception:  # a view that is old harms nobody
            if not self._is_blind:
                logger.exception("the engine's state cannot be seen: admission works without it")
            self._is_blind = True
        self._desk.see(demands, self._taken, room_of(self._engine))
        self._taken.clear()

    def _publish(self, outputs: list[RequestOutput]) -> None:
        """Hand outputs to their streams.

        The new state is visible first: who sees a request end also sees its pages free. Outputs of
        requests that are gone (the worker failed during the step) are dropped.
        """
        self._see()
        self._ledger.answer(outputs)

    # ---- failure ----

    def fail(self, reason: str) -> None:
        """End the worker, not the engine: every live and queued request is answered. Any thread."""
        if self._ledger.fail(reason, waiting_in(self._inbox)):
            self._stopping.set()

    def _pulse(self) -> int | None:
        """For the watchdog: changes whenever the engine's thread gets on; None while it waits."""
        return self._num_turns + self._engine.num_calls if self._is_working else None
