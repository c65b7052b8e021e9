"""The output of ``POST /v1/responses`` as it grows: messages, and calls of functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sortserve.api.tools.parsers import Delta, Parser, ToolDelta
from sortserve.core.sampling_params import SampledToken

__all__ = ["ResponseItems"]

IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"
Emit = Callable[..., None]
SayTokens = Callable[[Sequence[SampledToken]], list[dict[str, Any]]]
"""From tokens to the log probabilities that a part shows of them."""


@dataclass
class _Message:
    """One message with one part of text."""

    id: str
    texts: list[str] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self) -> dict[str, Any]:
        return _part(self.text, self.said)

    def body(self, status: str) -> dict[str, Any]:
        content = [] if status == IN_PROGRESS else [self.part()]
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }


@dataclass
class _Call:
    """One call of a function."""

    id: str
    call_id: str
    name: str
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)

    def body(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
        }


class ResponseItems:
    """Takes an answer as it comes, keeps its items, and tells of each change.

    Args:
        response_id: ``resp_...``; the ids of items follow from it.
        parser: finds calls in the text; None: all of it is text.
        emit: called with the type of each event and its fields.
        say: what a part of text shows of its tokens.
        with_tokens: whether a part of text shows any: then tokens without a text are told, too.
    """

    def __init__(
        self,
        response_id: str,
        parser: Parser | None,
        *,
        emit: Emit,
        say: SayTokens,
        with_tokens: bool,
    ) -> None:
        self._suffix = response_id.removeprefix("resp_")
        self._parser = parser
        self._emit = emit
        self._say = say
        self._with_tokens = with_tokens
        self._items: list[_Message | _Call] = []
        self._is_open = False
        self._blank = ""  # between calls, or before the first word
        self._tokens: list[SampledToken] = []  # of text that is held back

    def push(self, text: str, tokens: Sequence[SampledToken], exit_layer: int) -> None:
        """More of the answer, from one step."""
        if self._with_tokens:
            self._tokens += tokens
        delta = Delta(text) if self._parser is None else self._parser.push(text)
        self._take(delta, exit_layer)

    def finish(self, exit_layer: int, *, is_whole: bool) -> list[dict[str, Any]]:
        """The answer is over: its items as they are, the last one incomplete if it was cut."""
        if self._parser is not None:
            self._take(self._parser.finish(), exit_layer)
        if not self._items or (self._tokens and self._is_in_message):
            self._add_text(self._blank, exit_layer)
        last_status = COMPLETED if is_whole else INCOMPLETE
        self._close(last_status)
        statuses = [COMPLETED] * (len(self._items) - 1) + [last_status]
        return [item.body(status) for item, status in zip(self._items, statuses, strict=True)]

    # ---- what comes ----

    def _take(self, delta: Delta, exit_layer: int) -> None:
        if delta.content or (self._parser is None and self._tokens):
            self._take_text(delta.content, exit_layer)
        for call in delta.calls:
            self._take_call(call, exit_layer)

    def _take_text(self, text: str, exit_layer: int) -> None:
        is_blank = not (self._blank + text).strip()
        if self._parser is not None and is_blank and not self._is_in_message:
            self._blank += text
        else:
            self._add_text(self._blank + text, exit_layer)

    def _add_text(self, text: str, exit_layer: int) -> None:
        self._blank = ""
        message = self._items[-1] if self._is_open else None
        if not isinstance(message, _Message):
            message = _Message(self._new_id("msg"))
            self._open(message)
            empty = _part("", [])
            self._emit("response.content_part.added", **self._place(message), part=empty)
        said, self._tokens = self._say(self._tokens), []
        message.texts.append(text)
        message.said += said
        if text or said:
            self._emit(
                "response.output_text.delta",
                **self._place(message),
                delta=text,
                logprobs=said,
                exit_layer=exit_layer,
            )

    def _take_call(self, delta: ToolDelta, exit_layer: int) -> None:
        self._blank, self._tokens = "", []
        if delta.name is not None:
            assert delta.id is not None
            self._open(_Call(self._new_id("fc"), delta.id, delta.name))
        call = self._items[-1]
        assert isinstance(call, _Call)
        call.pieces.append(delta.arguments)
        if delta.arguments:
            self._emit(
                "response.function_call_arguments.delta",
                item_id=call.id,
                output_index=self._at,
                delta=delta.arguments,
                exit_layer=exit_layer,
            )

    # ---- items begin and end ----

    @property
    def _is_in_message(self) -> bool:
        return self._is_open and isinstance(self._items[-1], _Message)

    @property
    def _at(self) -> int:
        return len(self._items) - 1

    def _new_id(self, prefix: str) -> str:
        number = f"_{len(self._items)}" if self._items else ""
        return f"{prefix}_{self._suffix}{number}"

    def _place(self, message: _Message) -> dict[str, Any]:
        return {"item_id": message.id, "output_index": self._at, "content_index": 0}

    def _open(self, item: _Message | _Call) -> None:
        self._close(COMPLETED)
        self._items.append(item)
        self._is_open = True
        begun = item.body(IN_PROGRESS)
        self._emit("response.output_item.added", output_index=self._at, item=begun)

    def _close(self, status: str) -> None:
        if not self._is_open:
            return
        self._is_open = False
        item = self._items[-1]
        if isinstance(item, _Message):
            place = self._place(item)
            self._emit("response.output_text.done", **place, text=item.text, logprobs=item.said)
            self._emit("response.content_part.done", **place, part=item.part())
        else:
            self._emit(
                "response.function_call_arguments.done",
                item_id=item.id,
                output_index=self._at,
                name=item.name,
                arguments=item.arguments,
            )
        self._emit("response.output_item.done", output_index=self._at, item=item.body(status))


def _part(text: str, said: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": said}
