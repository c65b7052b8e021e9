"""From the bytes of a stream to typed events, and to the whole answer they add up to. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sortserve_client._exceptions import StreamError
from sortserve_client._sse import SSEDecoder
from sortserve_client._types import (
    BudgetReport,
    Choice,
    Generation,
    StreamEvent,
    TokenLogprob,
    Usage,
    budget_from_json,
    usage_from_json,
)

__all__ = ["Collector"]

END_OF_STREAM = "[DONE]"


@dataclass
class _OpenChoice:
    """One choice while its stream runs."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    budget: BudgetReport | None = None

    def add(self, choice: Choice) -> None:
        self.texts.append(choice.text)
        self.finish_reason = choice.finish_reason or self.finish_reason
        self.budget = choice.budget or self.budget
        if choice.logprobs is not None:
            self.logprobs = (self.logprobs or []) + list(choice.logprobs)
        if choice.token_ids is not None:
            self.token_ids = (self.token_ids or []) + list(choice.token_ids)

    def choice(self, index: int) -> Choice:
        return Choice(
            index=index,
            text="".join(self.texts),
            finish_reason=self.finish_reason,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            token_ids=None if self.token_ids is None else tuple(self.token_ids),
            budget=self.budget,
        )


class Collector:
    """Reads one stream. ``done`` turns true with its ``[DONE]``."""

    def __init__(self) -> None:
        self.done = False
        self.request_id: str | None = None
        self._decoder = SSEDecoder()
        self._id = ""
        self._model = ""
        self._choices: dict[int, _OpenChoice] = {}
        self._usage: Usage | None = None
        self._budget: BudgetReport | None = None

    def feed(self, chunk: bytes) -> Iterator[StreamEvent]:
        """The events that ``chunk`` completed. Bytes after ``[DONE]`` are ignored.

        Raises:
            StreamError: the server reported an error, or sent what cannot be read.
        """
        for message in self._decoder.feed(chunk):
            if self.done:
                return
            if message.data == END_OF_STREAM:
                self.done = True
                return
            yield from self._read(message.data)

    def snapshot(self) -> Generation:
        """The answer as far as it has come."""
        choices = tuple(self._choices[index].choice(index) for index in sorted(self._choices))
        budget = self._budget
        if budget is None and len(choices) == 1:
            budget = choices[0].budget
        return Generation(
            id=self._id,
            model=self._model,
            choices=choices,
            usage=self._usage or Usage(),
            budget=budget or BudgetReport(),
        )

    def result(self) -> Generation:
        """The whole answer.

        Raises:
            StreamError: the stream did not come to its end.
        """
        if not self.done:
            raise self.error("The stream ended before the answer was complete.")
        return self.snapshot()

    def error(self, message: str, details: Mapping[str, Any] | None = None) -> StreamError:
        """An error that carries what has arrived so far."""
        details = details or {}
        return StreamError(
            message,
            partial=self.snapshot() if self._choices else None,
            code=details.get("code"),
            param=details.get("param"),
            type=details.get("type"),
            request_id=self.request_id,
        )

    def _read(self, data: str) -> list[StreamEvent]:
        try:
            message = json.loads(data)
            if "error" not in message:
                return self._events(message)
            details = message["error"]
            text = details.get("message") or "The server reported an error inside the stream."
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.error(f"The stream holds an event that cannot be read: {data!r}") from error
        raise self.error(text, details)

    def _events(self, message: Mapping[str, Any]) -> list[StreamEvent]:
        self._id = message.get("id") or self._id
        self._model = message.get("model") or self._model
        budget = budget_from_json(message.get("budget"))
        usage = usage_from_json(message.get("usage"))
        choices = [Choice.from_json(choice) for choice in message["choices"]]
        if len(choices) == 1 and choices[0].budget is None:
            # A message about one choice that tells one budget tells that choice's.
            choices = [replace(choices[0], budget=budget)]
        else:
            self._budget = budget or self._budget
        self._usage = usage or self._usage
        for choice in choices:
            self._choices.setdefault(choice.index, _OpenChoice()).add(choice)
        if not choices and (usage or budget):
            return [StreamEvent(budget=budget, usage=usage)]
        exits = [choice.get("exit_layer") for choice in message["choices"]]
        return [
            _event(choice, exit_layer, budget, usage)
            for choice, exit_layer in zip(choices, exits, strict=True)
        ]


def _event(
    choice: Choice, exit_layer: int | None, budget: BudgetReport | None, usage: Usage | None
) -> StreamEvent:
    return StreamEvent(
        text=choice.text,
        index=choice.index,
        exit_layer=exit_layer,
        finish_reason=choice.finish_reason,
        logprobs=choice.logprobs,
        token_ids=choice.token_ids,
        budget=choice.budget or budget,
        usage=usage,
    )
