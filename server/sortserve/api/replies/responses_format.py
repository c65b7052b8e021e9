"""What ``POST /v1/responses`` answers: one object, or the events in which it grows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from sortserve.api.problems import error_body
from sortserve.api.replies.formats import GenerateFormat
from sortserve.api.replies.logprobs import token_entries
from sortserve.api.replies.models import BudgetReport
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
    """A response has one answer, which is one message with one part of text."""

    request: Mapping[str, Any]
    """The fields of the reply that repeat what was asked."""

    end: ClassVar[str] = ""
    """This API's streams end with their last event, and no ``[DONE]``."""
    _texts: list[str] = field(default_factory=list)
    _tokens: list[SampledToken] = field(default_factory=list)
    _num_events: int = 0

    # ---- streams ----

    def opening(self) -> str:
        """The response, the message and its part begin."""
        begun = self._response(self.generation.start_layer, "in_progress", None, [])
        message = self._message("in_progress", [])
        return (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
            + self._event("response.output_item.added", output_index=0, item=message)
            + self._event("response.content_part.added", **self._place, part=self._part("", ()))
        )

    def chunk(self, index: int, output: RequestOutput) -> str:
        """More text; with the last of it, everything that ends."""
        self._texts.append(output.text)
        events = ""
        if self.with_logprobs:
            self._tokens += output.tokens
        if output.text or (self.with_logprobs and output.tokens):
            events = self._event(
                "response.output_text.delta",
                **self._place,
                delta=output.text,
                logprobs=self._said_of(output.tokens),
                exit_layer=output.exit_layer,
            )
        return events if output.finish_reason is None else events + self._ending()

    def _ending(self) -> str:
        text, said = "".join(self._texts), self._said_of(self._tokens)
        part = self._part(text, self._tokens)
        whole = self.body_of(text, self._tokens)
        [message] = whole["output"]
        done = "response.output_text.done"
        return (
            self._event(done, **self._place, text=text, logprobs=said)
            + self._event("response.content_part.done", **self._place, part=part)
            + self._event("response.output_item.done", output_index=0, item=message)
            + self._event(f"response.{whole['status']}", response=whole)
        )

    def failure(self, error: SortserveError) -> str:
        """The last event of a stream that failed; OpenAI's client raises for it."""
        problem = error_body(error)
        return self._event("error", **{**problem["error"], "type": "error"}, **problem)

    def _event(self, kind: str, **fields: Any) -> str:
        message = {"sequence_number": self._num_events, **fields, "type": kind}
        self._num_events += 1
        return f"event: {kind}\ndata: {json.dumps(message, separators=(',', ':'))}\n\n"

    # ---- whole replies ----

    def body(self) -> dict[str, Any]:
        """The reply to a request that is not streamed."""
        [choice] = self.generation.choices
        return self.body_of(choice.text, choice.tokens)

    def body_of(self, text: str, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        """The response at its end."""
        [choice] = self.generation.choices
        is_whole = choice.finish_reason is FinishReason.STOP
        status = "completed" if is_whole else "incomplete"
        output = [self._message(status, [self._part(text, tokens)])]
        reasons = {FinishReason.LENGTH: "max_output_tokens"}
        why = choice.finish_reason
        reason = None if is_whole or why is None else reasons.get(why, str(why))
        return self._response(self.generation.exit_layer, status, reason, output)

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

    # ---- parts ----

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    @property
    def _message_id(self) -> str:
        return "msg_" + str(self.head["id"]).removeprefix("resp_")

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part(self, text: str, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        said = self._said_of(tokens)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": said}

    def _said_of(self, tokens: Sequence[SampledToken]) -> list[dict[str, Any]]:
        return token_entries(self.tokenizer, tokens) if self.with_logprobs else []
