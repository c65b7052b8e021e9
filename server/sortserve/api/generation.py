"""The sequences of one HTTP request: started together, merged, ended together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from sortserve.api.problems import renamed
from sortserve.core.errors import RequestTimeoutError, SortserveError
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.request import FinishReason, RequestOutput, RequestReport
from sortserve.core.sampling_params import SampledToken
from sortserve.engine.worker import RequestStream

__all__ = ["REPLY_HEADERS", "ChoiceResult", "Generation", "Outputs"]

EXIT_LAYER, DEGRADED = "x-exit-layer", "x-degraded"
PREDICTED_MS, BUDGET_MET = "x-predicted-ms", "x-budget-met"
REPLY_HEADERS = {
    EXIT_LAYER: "The exit in use at the end; of a stream, at its start",
    DEGRADED: "Whether the server made tokens shallower than the budget allows: true or false",
    PREDICTED_MS: "Arrival to the last token as predicted on arrival; absent without calibration",
    BUDGET_MET: "Whether every time was kept: true or false; absent without one, and in streams",
}
"""Headers that say what became of a budget, for proxies that read no bodies."""

Outputs = list[tuple[int, RequestOutput]]
"""Outputs that are here now, each with the index of its choice."""


@dataclass
class ChoiceResult:
    """What one sequence has given so far."""

    num_tokens: int = 0
    texts: list[str] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    """How many of ``tokens`` came with each text."""
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    report: RequestReport | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    def pieces(self) -> Iterator[tuple[str, Sequence[SampledToken]]]:
        """Each text with its tokens, as they came."""
        tokens = iter(self.tokens)
        for text, count in zip(self.texts, self.token_counts, strict=True):
            yield text, list(islice(tokens, count))


class Generation:
    """``num_prompts`` times ``n`` sequences; choice ``p * n + k`` is sample k of prompt p.

    Args:
        streams: one per choice; all start at one exit.
        num_prompt_tokens: one per prompt.
        deepest_layer: the deepest exit that the budget allows.
        names_exit: whether replies name the exit in ``model`` where it is not the deepest: the
            client bounded no time, and the server took depth away.
        field_names: the engine's field names as this request spells them, for errors.
        keep: whether to keep texts and tokens, or only to count them.
        on_end: called once, when all outputs are read or nobody reads on.
        prompt_logprobs: what the model says of each prompt, complete with its first output; empty:
            nobody asks.
        drops_answer: whether the client wants nothing but its prompts: outputs come without tokens.
    """

    def __init__(
        self,
        streams: Sequence[RequestStream],
        *,
        num_prompt_tokens: Sequence[int],
        deepest_layer: int,
        names_exit: bool,
        field_names: Mapping[str, str],
        keep: bool,
        on_end: Callable[[Generation], None] | None = None,
        prompt_logprobs: Sequence[PromptLogprobs] = (),
        drops_answer: bool = False,
    ) -> None:
        self.choices = [ChoiceResult() for _ in streams]
        self._streams = streams
        self._num_prompt_tokens = num_prompt_tokens
        self._deepest_layer = deepest_layer
        self._names_exit = names_exit
        self._field_names = field_names
        self._keep = keep
        self._on_end = on_end
        self._prompt_logprobs = prompt_logprobs
        self._drops_answer = drops_answer
        self.is_abandoned = False
        self._is_timed_out = False

    # ---- ending early ----

    def abort(self) -> None:
        """End every sequence that is not over. Idempotent."""
        for stream in self._streams:
            stream.abort()

    def abandon(self) -> None:
        """Abort, because nobody is there to read the answer."""
        self.is_abandoned = True
        self.abort()

    def time_out(self) -> None:
        """Abort, because the server's patience is over."""
        self._is_timed_out = True
        self.abort()

    # ---- outputs ----

    async def outputs(self) -> AsyncGenerator[Outputs, None]:
        """All outputs, those that arrive together at once, until every sequence has ended.

        The reader hands each one to ``take`` before it writes about it.

        Raises:
            SortserveError: what the engine ended a sequence with; the others are aborted.
        """
        try:
            if len(self._streams) == 1:  # for each token, so without a generator in between
                [stream] = self._streams
                while not stream.is_over:
                    await stream.wait()
                    yield [(0, self._wanted(output)) for output in stream.take_ready()]
            else:
                async with aclosing(self._merged()) as merged:
                    async for outputs in merged:
                        yield outputs
        except SortserveError as error:
            raise renamed(error, self._field_names) from error.__cause__
        finally:
            self.abort()
            if self._on_end is not None:
                self._on_end(self)

    def take(self, index: int, output: RequestOutput) -> None:
        """Count one output.

        Raises:
            RequestTimeoutError: it ends the sequence because ``time_out`` was called.
        """
        choice = self.choices[index]
        choice.num_tokens += len(output.tokens)
        if self._keep:
            choice.texts.append(output.text)
            choice.token_counts.append(len(output.tokens))
            choice.tokens.extend(output.tokens)
        if output.finish_reason is not None:
            if self._is_timed_out and output.finish_reason is FinishReason.ABORT:
                raise RequestTimeoutError(
                    "The request ran longer than this server allows. Ask for fewer tokens, or "
                    "give a budget with on_miss=truncate."
                )
            choice.finish_reason = output.finish_reason
            choice.report = output.report

    def _wanted(self, output: RequestOutput) -> RequestOutput:
        """The output, or what the client wants of it."""
        if not self._drops_answer:
            return output
        reason = output.finish_reason
        if reason is FinishReason.STOP:  # whatever the token was, the client's limit was none
            reason = FinishReason.LENGTH
        return replace(output, text="", tokens=(), finish_reason=reason)

    async def _merged(self) -> AsyncGenerator[Outputs, None]:
        arrived: deque[tuple[int, RequestOutput]] = deque()
        wake = asyncio.Event()

        async def pump(index: int, stream: RequestStream) -> None:
            try:
                while not stream.is_over:
                    await stream.wait()
                    arrived.extend((index, self._wanted(output)) for output in stream.take_ready())
                    wake.set()
            finally:
                wake.set()

        pumps = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(self._streams)]
        try:
            while arrived or not all(task.done() for task in pumps):
                await wake.wait()
                wake.clear()
                if arrived:
                    ready = list(arrived)
                    arrived.clear()
                    yield ready
                for task in pumps:
                    if task.done():
                        task.result()  # raises what ended it
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    # ---- what all of it came to ----

    def prompt_tokens(self, index: int) -> Sequence[SampledToken]:
        """The prompt's tokens of a choice that has given an output; empty if nobody asked."""
        if not self._prompt_logprobs:
            return ()
        n = len(self.choices) // len(self._num_prompt_tokens)
        return self._prompt_logprobs[index // n].tokens

    @property
    def num_values(self) -> int:
        """How much a reply has to say, for deciding where it is written: tokens and rivals."""
        said = sum(len(p.token_ids) * (p.num_top + 1) for p in self._prompt_logprobs)
        n = len(self.choices) // len(self._num_prompt_tokens)
        return n * said + sum(
            choice.num_tokens + sum(len(token.top_logprobs) for token in choice.tokens)
            for choice in self.choices
        )

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object so far. A prompt counts once, however many samples it has."""
        num_prompt = sum(self._num_prompt_tokens)
        num_output = sum(choice.num_tokens for choice in self.choices)
        n = len(self.choices) // len(self._num_prompt_tokens)
        first_reports = [choice.report for choice in self.choices[::n]]
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {
                "cached_tokens": sum(r.num_cached_tokens for r in first_reports if r is not None)
            },
        }

    def budget_reply(self) -> dict[str, Any] | None:
        """The ``budget`` object of the whole reply; of several sequences the costliest counts."""
        reports = [choice.report for choice in self.choices if choice.report is not None]
        if len(reports) <= 1:
            return reports[0].budget_reply() if reports else None
        replies = [report.budget_reply() for report in reports]
        num_tokens = [max(1, report.num_output_tokens) for report in reports]
        tokens_by_exit: dict[str, int] = {}
        for reply in replies:
            for exit_layer, count in reply["tokens_by_exit"].items():
                tokens_by_exit[exit_layer] = tokens_by_exit.get(exit_layer, 0) + count
        weighted = sum(r["compute"] * k for r, k in zip(replies, num_tokens, strict=True))
        met = [reply["met"] for reply in replies]
        combined: dict[str, Any] = {
            "exit_layer": min(reply["exit_layer"] for reply in replies),
            "tokens_by_exit": tokens_by_exit,
            "compute": round(weighted / sum(num_tokens), 4),
            "degraded": any(reply["degraded"] for reply in replies),
        }
        for name in replies[0]:
            if name.endswith("_ms"):
                known = [reply[name] for reply in replies if reply[name] is not None]
                combined[name] = max(known, default=None)
        combined["met"] = None if None in met else all(met)
        return combined

    # ---- depth ----

    @property
    def start_layer(self) -> int:
        """The exit at which all sequences start."""
        return self._streams[0].choice.exit_layer

    @property
    def exit_layer(self) -> int:
        """The shallowest exit in use at the end of a sequence; where none is over, the first."""
        reports = [choice.report for choice in self.choices]
        return min((r.exit_layer for r in reports if r is not None), default=self.start_layer)

    def model_at(self, name: str, exit_layer: int) -> str:
        """The model that a reply names for tokens of an exit: ``NAME@E`` where depth was taken."""
        is_named = self._names_exit and exit_layer < self._deepest_layer
        return f"{name}@{exit_layer}" if is_named else name

    def first_headers(self) -> dict[str, str]:
        """What the headers of a stream tell: what is known before the first token."""
        choices = [stream.choice for stream in self._streams]
        falls = any(choice.schedule is not None for choice in choices)
        is_degraded = falls or self.start_layer < self._deepest_layer
        predicted = [choice.estimate for choice in choices]
        times = [estimate.e2e_s * 1e3 for estimate in predicted if estimate is not None]
        return _headers(self.start_layer, is_degraded, max(times, default=None), None)

    def last_headers(self) -> dict[str, str]:
        """What the headers of a whole reply tell, in the words of its ``budget``."""
        reply = self.budget_reply()
        if reply is None:
            return self.first_headers()
        names = ("exit_layer", "degraded", "predicted_ms", "met")
        return _headers(*(reply[name] for name in names))


def _headers(
    exit_layer: int, degraded: bool, predicted_ms: float | None, met: bool | None
) -> dict[str, str]:
    """Reply headers; those of values that there are not are left out."""
    headers = {EXIT_LAYER: str(exit_layer), DEGRADED: str(degraded).lower()}
    if predicted_ms is not None:
        headers[PREDICTED_MS] = f"{predicted_ms:.3f}"
    if met is not None:
        headers[BUDGET_MET] = str(met).lower()
    return headers
