"""The engine on a thread of its own, and its front for the event loop.

The event loop never waits for the engine and the engine never waits for a client: requests and
aborts go in through a queue, a step's outputs come out through one ``call_soon_threadsafe`` per
event loop, and each stream buffers only its own tokens.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from sortserve.budget import ExitTable
from sortserve.engine.desk import AdmissionDesk
from sortserve.engine.engine import Engine
from sortserve.engine.queue_limits import QueueLimits, Reservation
from sortserve.errors import BudgetUnattainableError, EngineError, OverloadedError, UnavailableError
from sortserve.outputs import EngineStats, Estimate, GenerationRequest, RequestOutput
from sortserve.scheduling.admission import ExitChoice

__all__ = ["EngineWorker", "RequestStream"]

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed", "stopped"]
IDLE_POLL_S = 0.5


class RequestStream:
    """The outputs of one request, as an async iterator; only its own event loop touches it."""

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._abort = abort
        self._outputs: deque[RequestOutput] = deque()
        self._arrived = asyncio.Event()
        self._finished = False

    def deliver(self, output: RequestOutput) -> None:
        """Add an output (on the event loop)."""
        self._outputs.append(output)
        self._arrived.set()

    def abort(self) -> None:
        """End the request now; any thread, any number of times, also after it is over."""
        if not self._finished:
            self._abort(self.request_id)

    def take_ready(self) -> list[RequestOutput]:
        """The outputs that are here already, without waiting.

        An error that ended the request is raised once what came before it has been taken.
        """
        ready: list[RequestOutput] = []
        while self._outputs and not (ready and self._outputs[0].error is not None):
            ready.append(self._pop())
        return ready

    def _pop(self) -> RequestOutput:
        output = self._outputs.popleft()
        if output.finish_reason is not None or output.error is not None:
            self._finished = True
        if output.error is not None:
            raise output.error
        return output

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """Outputs until the last; raises the error the engine ended the request with."""
        while not self._finished:
            while not self._outputs:
                self._arrived.clear()
                await self._arrived.wait()
            yield self._pop()


@dataclass(frozen=True)
class _Submission:
    request: GenerationRequest
    choice: ExitChoice
    stream: RequestStream
    reservation: Reservation


@dataclass(frozen=True)
class _Abort:
    request_id: str


class EngineWorker:
    """Runs an engine on its own thread. All public methods are for the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_num_queued_reqs: int = 512,
        max_num_queued_tokens: int = 200_000,
    ) -> None:
        self._engine = engine
        self.clock = engine.clock
        self.exits: ExitTable = engine.exits
        self.max_model_len = engine.config.max_model_len
        self._limits = QueueLimits(
            max_requests=max_num_queued_reqs, max_tokens=max_num_queued_tokens
        )
        self._state: State = "loading"
        self._inbox: queue.SimpleQueue[_Submission | _Abort | None] = queue.SimpleQueue()
        self._stats = engine.stats()
        self._desk = AdmissionDesk(
            exits=engine.exits,
            policy=engine.config.policy,
            max_num_batched_tokens=engine.config.max_num_batched_tokens,
            overload_delay_s=engine.config.overload_delay_s,
            clock=engine.clock,
            expect=engine.expect,
            get_model=lambda: engine.cost_model,
        )
        # Requests that have come and gone, likewise.
        self._num_submitted = 0
        self._num_ended = 0
        self._thread: threading.Thread | None = None
        self._stop = False
        # Engine thread only:
        self._streams: dict[str, RequestStream] = {}
        self._reservations: dict[str, Reservation] = {}

    # ---- life ----

    @property
    def state(self) -> State:
        """loading, ready, draining, failed or stopped."""
        return self._state

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

    async def drain(self, timeout_s: float) -> bool:
        """Take no new work, let live requests finish, abort the rest; True if none was aborted."""
        if self._state == "ready":
            self._state = "draining"
        deadline = self.clock() + timeout_s
        while not self._is_idle() and self.clock() < deadline:
            await asyncio.sleep(0.02)
        clean = self._is_idle()
        await asyncio.to_thread(self.stop)
        return clean

    def stop(self) -> None:
        """Abort what lives (each gets its last output), end the thread. Idempotent."""
        if self._state != "failed":
            self._state = "draining"
        self._stop = True
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()
        if self._state != "failed":
            self._state = "stopped"

    def _is_idle(self) -> bool:
        return self._num_ended == self._num_submitted

    # ---- requests ----

    def reserve(self, num_requests: int, num_tokens: int) -> Reservation:
        """Take places in the queue, before tokenisation.

        Raises:
            InvalidRequestError: more requests at once than the queue can ever hold.
            OverloadedError: the queue is full; 429 with Retry-After.
            UnavailableError: loading, draining or failed; 503.
        """
        self._require_accepting()
        try:
            return self._limits.reserve(num_requests, num_tokens, retry_after_s=self._drain_s)
        except OverloadedError:
            self._rejected("queue_full")
            raise

    def submit(
        self, request: GenerationRequest, reservation: Reservation | None = None
    ) -> RequestStream:
        """Validate, choose the exit, queue; nothing runs yet. Needs a running event loop.

        Args:
            request: what to generate; its id must not be live.
            reservation: places taken by ``reserve``, of which this request takes one.

        Raises:
            InvalidRequestError: it can never be served; ``param`` names the field.
            BudgetUnattainableError: no exit fits and the budget says reject.
            UnavailableError: loading, draining or failed.
        """
        self._require_accepting()
        allowed = self._engine.validate(request)
        num_prompt = len(request.prompt_token_ids)
        try:
            choice = self._desk.choose(request, allowed)
        except BudgetUnattainableError:
            self._rejected("budget_unattainable", request)
            raise
        if reservation is None:
            reservation = self.reserve(1, num_prompt)
        place = reservation.take_one(num_prompt)
        stream = RequestStream(request.request_id, self._request_abort)
        self._num_submitted += 1
        self._desk.enter(request, choice)
        self._inbox.put(_Submission(request, choice, stream, place))
        return stream

    def estimate(self, exit_layer: int, num_prompt_tokens: int, max_tokens: int) -> Estimate | None:
        """Predicted times of a newcomer at an exit now; None before calibration."""
        return self._desk.estimate(exit_layer, num_prompt_tokens, max_tokens)

    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self._stats

    def _require_accepting(self) -> None:
        if self._state != "ready":
            raise UnavailableError(
                f"The server is {self._state} and takes no new requests.",
                code=self._state,
                retry_after_s=5.0,
            )

    def _rejected(self, reason: str, request: GenerationRequest | None = None) -> None:
        observer = self._engine.observer
        if observer is not None:
            observer.on_rejected(reason, request.budget if request else None)

    def _drain_s(self) -> float:
        """Predicted seconds until the queue has moved on; at least one."""
        return max(1.0, self._desk.queue_delay_s())

    def _request_abort(self, request_id: str) -> None:
        self._inbox.put(_Abort(request_id))

    # ---- the engine's thread ----

    def _run(self, prepare: Callable[[], None] | None, ready: Future[None]) -> None:
        try:
            if prepare is not None:
                prepare()
        except BaseException as error:
            ready.set_exception(error)
            return
        self._state = "ready"
        ready.set_result(None)
        try:
            while not self._stop:
                self._drain_inbox(wait=not self._engine.has_work)
                if self._engine.has_work:
                    self._publish(self._engine.step())
        except Exception:
            logger.exception("the engine stopped on an error of its own")
            self._state = "failed"
            self._fail_all()
        else:
            self._drain_inbox(wait=False)
            aborted = [self._engine.abort(request_id) for request_id in list(self._streams)]
            self._publish([output for output in aborted if output is not None])

    def _fail_all(self) -> None:
        """Answer every live and every queued request with the engine's failure."""
        error = EngineError("The engine has failed; the server must be restarted.")
        while not self._inbox.empty():
            message = self._inbox.get_nowait()
            if isinstance(message, _Submission):
                self._register(message)
        for request_id in list(self._streams):
            self._publish([RequestOutput(request_id=request_id, error=error)])

    def _register(self, submission: _Submission) -> None:
        request_id = submission.request.request_id
        assert request_id not in self._streams, "request ids are unique"
        self._streams[request_id] = submission.stream
        self._reservations[request_id] = submission.reservation

    def _drain_inbox(self, *, wait: bool) -> None:
        taken: list[str] = []
        while True:
            try:
                message = self._inbox.get(timeout=IDLE_POLL_S) if wait else self._inbox.get_nowait()
            except queue.Empty:
                break
            wait = False
            if isinstance(message, _Submission):
                self._register(message)
                self._engine.add_request(message.request, message.choice)
                taken.append(message.request.request_id)
            elif isinstance(message, _Abort):
                output = self._engine.abort(message.request_id)
                if output is not None:
                    self._publish([output])
        if taken:  # they count as the engine's from here on
            self._see()
            for request_id in taken:
                self._desk.taken(request_id)

    def _see(self) -> None:
        """Make the engine's present state visible to the event loop."""
        self._stats = self._engine.stats()
        self._desk.see(self._engine.demands())

    def _publish(self, outputs: list[RequestOutput]) -> None:
        """Hand outputs to their streams, with one wake-up per event loop.

        The new state is visible first: who sees a request end also sees its pages free.
        """
        self._see()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams[output.request_id]
            by_loop.setdefault(stream.loop, []).append((stream, output))
            ended = output.finish_reason is not None or output.error is not None
            if ended:
                del self._streams[output.request_id]
                self._num_ended += 1
            if ended or output.tokens:
                reservation = self._reservations.pop(output.request_id, None)
                if reservation is not None:
                    reservation.release()
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the loop is closed: nobody is left to read
                logger.debug("dropped %d outputs of a closed event loop", len(batch))


def _deliver(batch: list[tuple[RequestStream, RequestOutput]]) -> None:
    for stream, output in batch:
        stream.deliver(output)
