"""What ``POST /v1/responses`` answers: one object, or the events in which it grows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from sortserve.api.problems import error_body
from sortserve.api.replies.formats import GenerateFormat
from sortserve.api.replies.logprobs import token_entries
from sortserve.api.replies.models import BudgetReport
from sortserve.api.replies.response_items import ResponseItems
from sortserve.api.tools.choice import ToolChoice
from sortserve.api.tools.parsers import make_parser
from sortserve.core.errors import SortserveError
from sortserve.core.request import FinishReason, RequestOutput
from sortserve.core.sampling_params import SampledToken

__all__ = ["ResponsesFormat", "ResponsesResponse"]


class ResponsesResponse(BaseModel):
    """Reply of `POST /v1/responses`."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    usage: dict[str, Any] | None
    budget: BudgetReport | None = None


@dataclass(kw_only=True)
class ResponsesFormat(GenerateFormat):
    """A response has one answer: messages with one part of text each, and calls of functions."""

    request: Mapping[str, Any]
    """The fields of the reply that repeat what was asked."""
    choice: ToolChoice
    dialect: str | None
    """In which the model writes calls of its own accord."""

    end: ClassVar[str] = ""
    """This API's streams end with their last event, and no ``[DONE]``."""
    _events: list[str] = field(default_factory=list)
    _num_events: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._items = self._new_items(self._emit)

    def _new_items(self, emit: Callable[..., None]) -> ResponseItems:
        may_call = self.choice.kind != "none"
        return ResponseItems(
            str(self.head["id"]),
            make_parser(self.choice, self.dialect) if may_call else None,
            emit=emit,
            say=self._said_of,
            with_tokens=self.with_logprobs,
        )

    # ---- streams ----

    def opening(self) -> str:
        """The response begins."""
        begun = self._response(self.generation.start_layer, "in_progress", None, [])
        self._emit("response.created", response=begun)
        self._emit("response.in_progress", response=begun)
        return self._taken()

    def chunk(self, index: int, output: RequestOutput) -> str:
        """What is new; with the last of it, everything that ends."""
        self._items.push(output.text, output.tokens, output.exit_layer)
        if output.finish_reason is not None:
            whole = self._ended(self._items)
            self._emit(f"response.{whole['status']}", response=whole)
        return self._taken()

    def failure(self, error: SortserveError) -> str:
        """The last event of a stream that failed; OpenAI's client raises for it."""
        problem = error_body(error)
        self._emit("error", **problem, **problem["error"] | {"type": "error"})
        return self._taken()

    def _emit(self, kind: str, /, **fields: Any) -> None:
        message = {"sequence_number": self._num_events, **fields, "type": kind}
        self._num_events += 1
        data = json.dumps(message, separators=(",", ":"))
        self._events.append(f"event: {kind}\ndata: {data}\n\n")

    def _taken(self) -> str:
        text = "".join(self._events)
        self._events.clear()
        return text

    # ---- whole replies ----

    def body(self) -> dict[str, Any]:
        """The reply to a request that is not streamed: what its stream would end with."""
        [choice] = self.generation.choices
        items = self._new_items(lambda *args, **fields: None)
        for text, tokens in choice.pieces():  # as they came, so that the items are the stream's
            items.push(text, tokens, self.generation.exit_layer)
        return self._ended(items)

    def _ended(self, items: ResponseItems) -> dict[str, Any]:
        """The response at its end."""
        [choice] = self.generation.choices
        is_whole = choice.finish_reason is FinishReason.STOP
        exit_layer = self.generation.exit_layer
        output = items.finish(exit_layer, is_whole=is_whole)
        reasons = {FinishReason.LENGTH: "max_output_tokens"}
        why = choice.finish_reason
        reason = None if is_whole or why is None else reasons.get(why, str(why))
        status = "completed" if is_whole else "incomplete"
        return self._response(exit_layer, status, reason, output)

    def _response(
        self, exit_layer: int, status: str, reason: str | None, output: list[dict[str, Any]]
    ) -> dict[str, Any]:
        is_over = status != "in_progress"
        return {
            **self.head_at(exit_layer),
            "status": status,
            "error": None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": output,
            **self.request,
            "usage": self._usage() if is_over else None,
            "budget": self.generation.budget_reply() if is_over else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _said_of(self, tokens: Sequence[SampledToken]) -> list[dict[str, Any]]:
        return token_entries(self.tokenizer, tokens) if self.with_logprobs else []
