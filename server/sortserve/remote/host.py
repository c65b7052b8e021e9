"""A replica's side: requests of a router go to the worker, its outputs go back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from sortserve.core.budget import Budget
from sortserve.core.errors import EngineError, SortserveError
from sortserve.core.grammar import Grammar, OutputFormat
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.request import Request, RequestOutput
from sortserve.core.sampling_params import SampledToken
from sortserve.engine.stream import RequestStream
from sortserve.engine.worker import EngineWorker
from sortserve.replicas.messages import (
    Accepted,
    Handover,
    Item,
    Outputs,
    Refused,
    ReplicaReport,
    arrival_at,
)
from sortserve.telemetry.totals import Totals

__all__ = ["ReplicaHost"]

Indexed = tuple[int, RequestOutput]


class ReplicaHost:
    """Serves handed-over requests with a worker of this process; for its event loop's thread.

    Args:
        worker: runs the engine; its start and end are the caller's.
        compile_grammar: what an answer in a format must match; may take a while, on any thread.
        totals: what the engine has done.
        replica_id: a name that no other replica has.
        default_budget: of requests that give none.
        unix_clock: time of day, in seconds.
    """

    def __init__(
        self,
        worker: EngineWorker,
        *,
        compile_grammar: Callable[[OutputFormat], Grammar],
        totals: Totals,
        replica_id: str,
        default_budget: Budget,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self.replica_id = replica_id
        self._worker = worker
        self._compile_grammar = compile_grammar
        self._totals = totals
        self.default_budget = default_budget
        self._unix_clock = unix_clock

    def report(self) -> ReplicaReport:
        """How this replica stands."""
        return ReplicaReport(
            state=self._worker.state,
            load=self._worker.load(),
            stats=self._worker.stats(),
            admission=self._worker.admission_stats(self.default_budget),
            tokens_by_exit=self._totals.tokens_by_exit,
            layers=self._totals.layers,
            budgets=self._totals.budgets,
        )

    async def generate(self, handover: Handover) -> AsyncGenerator[Item, None]:
        """Run the requests: ``Refused``, or ``Accepted`` and then outputs until the last.

        Whoever stops reading ends them: their pages come back at once.
        """
        now, unix_s = self._worker.clock(), self._unix_clock()
        arrival_s = arrival_at(handover, now_s=now, unix_s=unix_s)
        try:
            requests = await self._made_ours(handover, arrival_s)
            num_tokens = sum(len(request.prompt_token_ids) for request in requests)
            with self._worker.reserve(len(requests), num_tokens) as reservation:
                streams = await self._worker.submit_all(
                    requests, reservation, num_samples=handover.num_samples
                )
        except SortserveError as error:
            yield Refused(self.replica_id, error)
            return
        try:
            choices = tuple(
                (own.exit_layer, own.estimate, own.fits, own.schedule)
                for own in (stream.choice for stream in streams)
            )
            yield Accepted(self.replica_id, arrival_s, choices)
            scored = _Scored(requests)
            held: list[Indexed] = []
            async for outputs in _merged(streams):
                held.extend(outputs)
                if handover.is_streamed:
                    yield Outputs(tuple(held), scored.take(outputs))
                    held.clear()
            if held:
                yield Outputs(tuple(held), scored.take(held))
        finally:
            for stream in streams:
                stream.abort()

    async def _made_ours(self, handover: Handover, arrival_s: float) -> list[Request]:
        """The requests on this process's clock, with their grammar and one score per prompt."""
        format_ = handover.requests[0].sampling.output_format
        grammar = None
        if format_ is not None:
            grammar = await asyncio.to_thread(self._compile_grammar, format_)
        made: list[Request] = []
        asked: PromptLogprobs | None = None
        for i, request in enumerate(handover.requests):
            if i % handover.num_samples == 0:
                asked = request.prompt_logprobs
            made.append(
                replace(request, arrival_s=arrival_s, grammar=grammar, prompt_logprobs=asked)
            )
        return made


class _Scored:
    """Says what the model makes of each prompt, once, with the first output after it."""

    def __init__(self, requests: Sequence[Request]) -> None:
        asked = [request.prompt_logprobs for request in requests]
        self._first = {id(own): i for i, own in reversed(list(enumerate(asked))) if own is not None}
        self._asked = asked

    def take(self, outputs: Sequence[Indexed]) -> tuple[tuple[int, Sequence[SampledToken]], ...]:
        """Of the prompts of these outputs, those that have not been told yet."""
        told = []
        for index, _ in outputs if self._first else ():
            own = self._asked[index]
            if own is not None and own.is_complete and id(own) in self._first:
                told.append((self._first.pop(id(own)), own.tokens))
        return tuple(told)


async def _merged(streams: Sequence[RequestStream]) -> AsyncGenerator[list[Indexed], None]:
    """What comes, as it comes, until every stream has ended; errors are outputs like others."""
    if len(streams) == 1:  # for each token, so without a task in between
        [stream] = streams
        while not stream.is_over:
            await stream.wait()
            yield [(0, output) for output in _ready(stream)]
        return
    arrived: list[Indexed] = []
    wake = asyncio.Event()

    async def pump(index: int, stream: RequestStream) -> None:
        while not stream.is_over:
            await stream.wait()
            arrived.extend((index, output) for output in _ready(stream))
            wake.set()

    pumps = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        while arrived or not all(pump.done() for pump in pumps):
            await wake.wait()
            wake.clear()
            if arrived:
                ready = list(arrived)
                arrived.clear()
                yield ready
            await asyncio.sleep(0)  # a pump that has set the event is done a moment later
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _ready(stream: RequestStream) -> list[RequestOutput]:
    try:
        return stream.take_ready()
    except SortserveError as error:
        return [RequestOutput(request_id=stream.request_id, error=error)]
    except Exception:  # it is the router's to answer, which must hear of it
        failed = EngineError("The server failed on this request.")
        return [RequestOutput(request_id=stream.request_id, error=failed)]
