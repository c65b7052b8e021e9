"""Who has been accepted and has yet to be answered (no torch)."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sortserve.admission.choose import ExitChoice
from sortserve.admission.queue_limits import Reservation
from sortserve.core.errors import EngineError, UnavailableError
from sortserve.core.request import Request, RequestOutput
from sortserve.engine.stream import RequestStream, send

__all__ = ["Abort", "Ledger", "State", "Submission", "waiting_in"]

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed", "stopped"]


@dataclass(frozen=True)
class Submission:
    """A request on its way to the engine."""

    request: Request
    choice: ExitChoice
    stream: RequestStream
    reservation: Reservation


@dataclass(frozen=True)
class Abort:
    """A request whose client reads no more."""

    request_id: str


class Ledger:
    """The worker's state, and every accepted request until its last output; any thread may call.

    One lock holds all of it: a request is accepted and a failure is declared under it, so each
    accepted request gets an end, and only one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: State = "loading"
        self._failure: str | None = None
        self._num_accepted = 0
        self._num_ended = 0
        self._streams: dict[str, RequestStream] = {}
        self._reservations: dict[str, Reservation] = {}

    @property
    def state(self) -> State:
        """loading, ready, draining, failed or stopped."""
        return self._state

    @property
    def failure(self) -> str | None:
        """Why the worker has failed; None as long as it has not."""
        return self._failure

    @property
    def num_accepted(self) -> int:
        """Requests that have ever been accepted."""
        return self._num_accepted

    @property
    def is_idle(self) -> bool:
        """Whether every accepted request has had its end."""
        return self._num_ended == self._num_accepted

    def move(self, state: State, *, of: Iterable[State]) -> None:
        """Go to a state, if the present one is among ``of``."""
        with self._lock:
            if self._state in of:
                self._state = state

    def require_accepting(self) -> None:
        """Refuse whoever comes at the wrong time.

        Raises:
            UnavailableError: loading, draining, failed or stopped; 503.
        """
        if self._state != "ready":
            raise UnavailableError(
                f"The server is {self._state} and takes no new requests.",
                code=self._state,
                retry_after_s=5.0,
            )

    def accept(self, send_in: Callable[[], None]) -> None:
        """Send a request in, unless it would wait for an engine that is gone.

        Raises:
            UnavailableError: as ``require_accepting``.
        """
        with self._lock:
            self.require_accepting()
            send_in()
            self._num_accepted += 1

    def take(self, submission: Submission) -> bool:
        """Enter a request that has left the inbox; False if the failure came first."""
        request_id = submission.request.request_id
        with self._lock:
            if self._state == "failed":
                send([(submission.stream, _engine_failed(request_id))])
                submission.reservation.release()
                return False
            assert request_id not in self._streams, "request ids are unique"
            self._streams[request_id] = submission.stream
            self._reservations[request_id] = submission.reservation
            return True

    def live_ids(self) -> list[str]:
        """Requests that have been taken and have no end."""
        with self._lock:
            return list(self._streams)

    def answer(self, outputs: Iterable[RequestOutput]) -> None:
        """Hand outputs to their streams; those of requests that are gone are dropped."""
        with self._lock:
            pairs = []
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    pairs.append((stream, output))
                    self._account(output)
            send(pairs)

    def _account(self, output: RequestOutput) -> None:
        """Under the lock: what an output ends, and what it gives back."""
        ended = output.finish_reason is not None or output.error is not None
        if ended:
            del self._streams[output.request_id]
            self._num_ended += 1
        if ended or output.tokens:
            reservation = self._reservations.pop(output.request_id, None)
            if reservation is not None:
                reservation.release()

    def fail(self, reason: str, waiting: Iterable[Submission]) -> bool:
        """Declare the failure and answer everybody; False if it has been declared before.

        Args:
            reason: for the log.
            waiting: requests in the inbox, read under the lock.
        """
        with self._lock:
            if self._state == "failed":
                return False
            logger.error("the engine has failed: %s", reason)
            self._state, self._failure = "failed", reason
            streams, places = list(self._streams.values()), list(self._reservations.values())
            for submission in waiting:
                streams.append(submission.stream)
                places.append(submission.reservation)
            self._streams.clear()
            self._reservations.clear()
            self._num_ended = self._num_accepted
            for place in places:
                place.release()
            send([(stream, _engine_failed(stream.request_id)) for stream in streams])
            return True


def _engine_failed(request_id: str) -> RequestOutput:
    """The last output of a request that the engine left behind."""
    error = EngineError(
        "The engine has failed; the server must be restarted.", code="engine_failed"
    )
    return RequestOutput(request_id=request_id, error=error)


def waiting_in(inbox: queue.SimpleQueue[Submission | Abort | None]) -> Iterator[Submission]:
    """Empties the inbox, and gives the requests that were in it."""
    while True:
        try:
            message = inbox.get_nowait()
        except queue.Empty:
            return
        if isinstance(message, Submission):
            yield message
