"""Chat replies that may hold calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sortserve.api.generation import ChoiceResult
from sortserve.api.replies.formats import ChatFormat
from sortserve.api.replies.streaming import event
from sortserve.api.tools.choice import ToolChoice
from sortserve.api.tools.parsers import Delta, Parser, make_parser
from sortserve.core.request import FinishReason, RequestOutput

__all__ = ["ToolFormat"]


@dataclass(kw_only=True)
class ToolFormat(ChatFormat):
    """``POST /v1/chat/completions`` where the model may call tools."""

    choice: ToolChoice
    dialect: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parsers: dict[int, Parser] = {}

    def _parser(self) -> Parser:
        return make_parser(self.choice, self.dialect)

    def chunk(self, index: int, output: RequestOutput) -> str:
        """The event of a token step; none where its text may still become a call."""
        parser = self._parsers.setdefault(index, self._parser())
        delta = parser.push(output.text)
        if output.finish_reason is not None:
            rest = parser.finish()
            delta = Delta(delta.content + rest.content, delta.calls + rest.calls)
        message = self._full_chunk(index, output)
        [choice] = message["choices"]
        choice["delta"] = _body(delta)
        choice["finish_reason"] = _reason(output.finish_reason, parser)
        is_empty = not choice["delta"] and choice["finish_reason"] is None
        return "" if is_empty and self._is_plain else event(message)

    def _whole(self, index: int, choice: ChoiceResult) -> dict[str, Any]:
        parser = self._parsers.setdefault(index, self._parser())
        first, rest = parser.push(choice.text), parser.finish()
        calls = [call.body() for call in first.calls + rest.calls]
        for call in calls:
            del call["index"]
        message = {"role": "assistant", "content": (first.content + rest.content) or None}
        return {"message": {**message, "tool_calls": calls} if calls else _text_only(message)}

    def body(self) -> dict[str, Any]:
        """The reply to a request that is not streamed."""
        reply = super().body()

        def choices() -> Any:
            for choice in reply["choices"]:
                parser = self._parsers[choice["index"]]
                yield {**choice, "finish_reason": _reason(choice["finish_reason"], parser)}

        return {**reply, "choices": choices()}


def _text_only(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": message["content"] or ""}


def _body(delta: Delta) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if delta.content:
        body["content"] = delta.content
    if delta.calls:
        body["tool_calls"] = [call.body() for call in delta.calls]
    return body


def _reason(reason: FinishReason | None, parser: Parser) -> str | None:
    if reason is FinishReason.STOP and parser.num_calls:
        return "tool_calls"
    return reason
