"""An engine in this process and the callers of its answers, on whatever thread they are.

The engine runs on the thread of an ``EngineWorker``, as in a server. Callers with an event loop
wait on that; for the others there is one here, on a thread of its own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from queue import SimpleQueue

from sortserve.core.errors import EngineError, SortserveError
from sortserve.core.request import Request, RequestOutput
from sortserve.core.sampling_params import SampledToken
from sortserve.engine.assemble import EngineParts
from sortserve.engine.worker import STOP_TIMEOUT_S, EngineWorker
from sortserve.llm.loop_thread import LoopThread
from sortserve.llm.results import Completion, Result

__all__ = ["OfflineEngine", "Task", "blamed"]

WAVES = 2
"""So many full batches are with the engine at once: the next is there before one ends, and a step
does not get slower with what waits behind."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt whose samples can be served."""

    index: int
    name: str
    """What the caller knows it by, for errors."""
    prompt: str | None
    samples: tuple[Request, ...]


class OfflineEngine:
    """Answers tasks; any thread and any event loop may call.

    Args:
        parts: an engine that nobody else runs.
        calibrate: measure what steps cost before the first task.
    """

    def __init__(self, parts: EngineParts, *, calibrate: bool = False) -> None:
        self.parts = parts
        unlimited = sys.maxsize  # who fills this queue is the one who waits for it
        self._worker = EngineWorker(
            parts.engine, max_num_queued_reqs=unlimited, max_num_queued_tokens=unlimited
        )
        self._worker.start(parts.calibrate if calibrate else None)
        parts.watch(self._worker.fail)
        self._loop = LoopThread("llm")
        self._max_in_flight = WAVES * parts.engine.config.max_num_seqs
        self._submitting = threading.Lock()  # the worker takes one caller at a time

    def close(self) -> None:
        """End the engine; what lives gets its last output, with ``finish_reason`` ``abort``."""
        self._worker.stop(STOP_TIMEOUT_S)
        self._loop.close()
        self.parts.close()

    # ---- whole answers ----

    def answer(self, tasks: Sequence[Task], on_result: Callable[[Result], object]) -> list[Result]:
        """The results in the tasks' order; ``on_result`` gets each when it is there.

        Raises:
            SortserveError: what ended a sample, named; the others are ended, too.
        """
        return self._loop.run(self.answer_async(tasks, on_result))

    async def answer_async(
        self, tasks: Sequence[Task], on_result: Callable[[Result], object]
    ) -> list[Result]:
        """``answer`` on the caller's event loop."""
        room = asyncio.Semaphore(self._max_in_flight)  # first come, first served: seeds keep order

        async def complete(task: Task, request: Request) -> Completion:
            async with room:
                return await self._complete(task, request)

        async def collect(task: Task, samples: Sequence[asyncio.Task[Completion]]) -> Result:
            result = Result(
                index=task.index,
                prompt=task.prompt,
                prompt_token_ids=task.samples[0].prompt_token_ids,
                outputs=tuple(await asyncio.gather(*samples)),
            )
            on_result(result)
            return result

        running: list[asyncio.Task[Completion]] = []
        collecting: list[asyncio.Task[Result]] = []
        for task in tasks:
            samples = [asyncio.create_task(complete(task, r)) for r in task.samples]
            running += samples
            collecting.append(asyncio.create_task(collect(task, samples)))
        try:
            return await asyncio.gather(*collecting)
        finally:
            for each in (*running, *collecting):
                each.cancel()
            await asyncio.gather(*running, *collecting, return_exceptions=True)

    async def _complete(self, task: Task, request: Request) -> Completion:
        texts: list[str] = []
        tokens: list[SampledToken] = []
        async with aclosing(self.outputs(task, request)) as outputs:
            async for output in outputs:
                texts.append(output.text)
                tokens += output.tokens
        assert output.finish_reason is not None
        if output.report is None:
            raise EngineError("There is no report of this answer; the log says why.")
        return Completion(
            index=request.sample_index,
            text="".join(texts),
            token_ids=tuple(token.token_id for token in tokens),
            finish_reason=output.finish_reason,
            logprobs=None if request.sampling.logprobs is None else tuple(tokens),
            report=output.report,
        )

    # ---- answers as they come ----

    async def outputs(self, task: Task, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one sample; to close it ends the sample.

        Raises:
            SortserveError: what ended it, named.
        """
        try:
            with self._submitting:
                stream = self._worker.submit(request)
            try:
                async for output in stream:
                    yield output
            finally:
                stream.abort()
        except SortserveError as error:
            raise blamed(error, "prompt", task.name) from error

    def stream(self, task: Task) -> Iterator[RequestOutput]:
        """The outputs of a task's first sample, for a caller without an event loop."""
        arrived: SimpleQueue[RequestOutput | BaseException | None] = SimpleQueue()

        async def pump() -> None:
            try:
                async with aclosing(self.outputs(task, task.samples[0])) as outputs:
                    async for output in outputs:
                        arrived.put(output)
                arrived.put(None)
            except BaseException as error:
                arrived.put(error)

        pumping = self._loop.start(pump())
        try:
            while (item := arrived.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            pumping.cancel()


def blamed(error: SortserveError, part: str, name: str) -> SortserveError:
    """The error in the caller's words: what is wrong with ``part`` is wrong with ``name``.

    Any other one says which of several prompts (``prompts.3``) it is about.
    """
    param = error.param or ""
    if param == part or param.startswith(f"{part}."):
        message = error.message.replace(part, name, 1)
        param = name + param.removeprefix(part)
    else:
        message = f"{name}: {error.message}" if "." in name else error.message
    return type(error)(
        message, param=param or None, code=error.code, retry_after_s=error.retry_after_s
    ).with_traceback(error.__traceback__)
