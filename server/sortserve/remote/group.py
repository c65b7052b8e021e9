"""The sequences of one client's request at a replica, and at another if that one fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from sortserve.admission.choose import ExitChoice
from sortserve.core.errors import OverloadedError, SortserveError, UnavailableError
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.request import FinishReason, Request, RequestOutput
from sortserve.engine.stream import RequestStream
from sortserve.remote.link import Link, ReplicaLostError
from sortserve.replicas.choice import RoutedRequest
from sortserve.replicas.messages import Accepted, Handover, Item, Outputs, Refused, shifted

__all__ = ["Group"]

logger = logging.getLogger(__name__)

MAX_LOSSES = 2
"""Replicas that a request may be lost with, before it is given up."""


class Group:
    """Requests that go to one replica together; ``run`` is a task of its own.

    A refusal is retried once, elsewhere. A loss is, too, as long as nobody has read an output: a
    reply that is not streamed is read when it is whole. What has been read cannot be taken back.

    Args:
        requests: at least one; the samples of each prompt in a row.
        num_samples: of each prompt.
        routed: what the choice of a replica goes by.
        link: carries them.
        clock: monotonic; that of the requests.
        unix_clock: time of day.
        is_streamed: whether outputs are read as they come.
        is_open: whether requests may still be sent anywhere.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        num_samples: int,
        routed: RoutedRequest,
        link: Link,
        clock: Callable[[], float],
        unix_clock: Callable[[], float],
        is_streamed: bool,
        is_open: Callable[[], bool],
    ) -> None:
        self._requests = requests
        self._num_samples = num_samples
        self._routed = routed
        self._link = link
        self._clock = clock
        self._unix_clock = unix_clock
        self._is_streamed = is_streamed
        self._is_open = is_open
        nowhere = ExitChoice(0, None, False)  # until a replica has said where
        self.streams = [RequestStream(own.request_id, self._abort, nowhere) for own in requests]
        self._ended = [False] * len(requests)
        self._has_output = False
        self._ahead_s = 0.0
        """By how much the requests' clock is ahead of the replica's."""
        self._not_to: set[str] = set()
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether a replica has let all of them in, or none has."""
        return self._accepted.done()

    async def accepted(self) -> None:
        """Wait until a replica has let all of them in.

        Raises:
            SortserveError: none has.
        """
        self.task = asyncio.create_task(self._run())
        try:
            await asyncio.shield(self._accepted)
        except asyncio.CancelledError:
            self.task.cancel()
            raise

    def abort_all(self) -> None:
        """End every sequence that has not ended: each gets its last output. Idempotent."""
        for stream in self.streams:
            stream.abort()

    # ---- the task ----

    async def _run(self) -> None:
        error: BaseException | None = None
        try:
            await self._run_somewhere()
        except SortserveError as its:
            error = its
        except asyncio.CancelledError:
            error = UnavailableError("The server is shutting down.", code="draining")
        except Exception as its:
            logger.exception("a request to a replica failed")
            error = ReplicaLostError(f"The request to the replica failed ({type(its).__name__}).")
        self._end(error or ReplicaLostError("The replica left the request without an end."))

    def _end(self, error: BaseException) -> None:
        if not self._accepted.done():
            self._accepted.set_exception(error)
            self._accepted.exception()  # whoever waited may be gone
        for index, stream in enumerate(self.streams):
            if not self._ended[index]:
                assert isinstance(error, SortserveError)
                self._deliver(index, RequestOutput(request_id=stream.request_id, error=error))

    async def _run_somewhere(self) -> None:
        refusal: Refused | None = None
        num_losses = 0
        while True:
            last = None
            try:
                async with aclosing(self._link.open(self._handover())) as items:
                    async for item in items:
                        last = item
                        self._take(item)
            except ReplicaLostError as error:
                num_losses += 1
                if self._has_output or num_losses >= MAX_LOSSES or not self._is_open():
                    raise
                logger.warning("a replica was lost, its request goes elsewhere: %s", error)
                continue
            if not isinstance(last, Refused):
                return
            self._not_to.add(last.replica_id)
            if refusal is not None or not self._may_go_elsewhere(last.error):
                raise _sooner(refusal, last)
            refusal = last

    def _handover(self) -> Handover:
        now = self._clock()
        return Handover(
            requests=tuple(replace(own, grammar=None) for own in self._requests),
            num_samples=self._num_samples,
            routed=self._routed,
            elapsed_s=now - self._requests[0].arrival_s,
            sent_unix_s=self._unix_clock(),
            is_streamed=self._is_streamed,
            not_to=frozenset(self._not_to),
        )

    def _may_go_elsewhere(self, error: SortserveError) -> bool:
        """Whether another replica may take what one refused, in time."""
        if not isinstance(error, OverloadedError | UnavailableError) or not self._is_open():
            return False
        limits = [self._routed.budget.latency_ms, self._routed.budget.ttft_ms]
        elapsed_ms = (self._clock() - self._requests[0].arrival_s) * 1e3
        if any(limit is not None and elapsed_ms >= limit for limit in limits):
            return False
        reports = self._link.directory.reports()
        return any(
            report is None or report.is_accepting
            for name, report in reports.items()
            if name not in self._not_to
        )

    def _take(self, item: Item) -> None:
        if isinstance(item, Accepted):
            self._ahead_s = self._requests[0].arrival_s - item.arrival_s
            self._not_to.add(item.replica_id)  # if it is lost, the request goes elsewhere
            for stream, (exit_layer, estimate, fits, schedule) in zip(
                self.streams, item.choices, strict=True
            ):
                stream.choice = ExitChoice(exit_layer, estimate, fits, schedule=schedule)
            if not self._accepted.done():
                self._accepted.set_result(None)
        elif isinstance(item, Outputs):
            self._has_output = True
            for index, tokens in item.scored:
                asked = self._requests[index].prompt_logprobs
                assert isinstance(asked, PromptLogprobs)
                asked.record(0, tokens[1:])
            for index, output in item.outputs:
                if not self._ended[index]:
                    self._deliver(index, shifted(output, self._ahead_s))

    def _deliver(self, index: int, output: RequestOutput) -> None:
        if output.finish_reason is not None or output.error is not None:
            self._ended[index] = True
        self.streams[index].deliver(output)

    def _abort(self, request_id: str) -> None:
        """A sequence is not wanted any more; the replica hears of it when none is."""
        for index, stream in enumerate(self.streams):
            if stream.request_id == request_id and not self._ended[index]:
                self._deliver(
                    index, RequestOutput(request_id=request_id, finish_reason=FinishReason.ABORT)
                )
        if all(self._ended) and self.task is not None:
            self.task.cancel()


def _sooner(first: Refused | None, second: Refused) -> SortserveError:
    """Of two refusals the one to tell: whoever may come back sooner."""
    if first is None:
        return second.error
    a, b = first.error, second.error
    if type(a) is type(b) and (a.retry_after_s or 0.0) < (b.retry_after_s or 0.0):
        return a
    return b
