"""From the engine's thread to the event loops: what a request's client reads."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from sortserve.admission.choose import ExitChoice
from sortserve.core.errors import EngineError
from sortserve.core.request import RequestOutput

__all__ = ["RequestStream", "send"]

logger = logging.getLogger(__name__)


class RequestStream:
    """The outputs of one request, as an async iterator; only its own event loop touches it."""

    def __init__(self, request_id: str, abort: Callable[[str], None], choice: ExitChoice) -> None:
        self.request_id = request_id
        self.choice = choice
        """Where the request starts, and what was predicted for it."""
        self.loop = asyncio.get_running_loop()
        self._abort = abort
        self._outputs: deque[RequestOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._finished = False

    @property
    def is_over(self) -> bool:
        """Whether the last output has been taken."""
        return self._finished

    def deliver(self, output: RequestOutput) -> None:
        """Add an output (on the event loop)."""
        self._add(output)

    def _add(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        # A future, as this runs for each token: an asyncio.Event costs more.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self) -> None:
        """End the stream with an error (on the event loop): an output could not be delivered."""
        error = EngineError("The server failed on this request.")
        self._add(RequestOutput(request_id=self.request_id, error=error))

    def abort(self) -> None:
        """End the request now; any thread, any number of times, also after it is over."""
        if not self._finished:
            self._abort(self.request_id)

    async def wait(self) -> None:
        """Wait until there is an output to take. One reader at a time."""
        while not self._outputs:
            assert self._waiter is None, "two readers of one stream"
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

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
            await self.wait()
            yield self._pop()


def send(pairs: Iterable[tuple[RequestStream, RequestOutput]]) -> None:
    """Outputs to their streams, with one wake-up per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, RequestOutput]]] = {}
    for stream, output in pairs:
        by_loop.setdefault(stream.loop, []).append((stream, output))
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, batch)
        except RuntimeError:  # the loop is closed: nobody is left to read
            logger.debug("dropped %d outputs of a closed event loop", len(batch))


def _deliver(batch: list[tuple[RequestStream, RequestOutput]]) -> None:
    for stream, output in batch:
        try:
            stream.deliver(output)
        except Exception:
            logger.exception("an output of request %s was lost", stream.request_id)
            stream.abort()
            stream.fail()
