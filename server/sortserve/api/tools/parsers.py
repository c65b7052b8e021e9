"""From the text of an answer to calls of tools, as it comes.

Forced calls are written by our own grammar, so their form is known to the letter, and arguments
are passed on while they are written. In ``auto`` the model writes in the form of its own template,
and a call is passed on when it is whole; what turns out to be none is text after all.

    Hermes, Qwen    text <tool_call>{"name": ..., "arguments": {...}}</tool_call> ...
    Llama 3         {"name": ..., "parameters": {...}}; ...     <|python_tag|> before it is hidden
    Mistral         [{"name": ..., "arguments": {...}}, ...]    [TOOL_CALLS] before it is hidden
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from sortserve.api.tools.choice import ToolChoice

__all__ = ["Delta", "Parser", "ToolDelta", "make_parser"]

NewId = Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class ToolDelta:
    """What is new of one call."""

    index: int
    name: str | None = None
    """Its function, in its first delta."""
    id: str | None = None
    arguments: str = ""

    def body(self) -> dict[str, Any]:
        """As a stream writes it."""
        function: dict[str, Any] = {"arguments": self.arguments}
        if self.name is None:
            return {"index": self.index, "function": function}
        head = {"index": self.index, "id": self.id, "type": "function"}
        return {**head, "function": {"name": self.name, **function}}


@dataclass
class Delta:
    """What a piece of text turned out to be."""

    content: str = ""
    calls: list[ToolDelta] = field(default_factory=list)


class Parser(Protocol):
    """Reads one answer."""

    num_calls: int

    def push(self, text: str) -> Delta:
        """New text."""

    def finish(self) -> Delta:
        """The answer is over: what was held back."""


def make_parser(choice: ToolChoice, dialect: str | None) -> Parser:
    """The parser of a request.

    Args:
        choice: what it asks of the model; not ``none``.
        dialect: of the checkpoint's template, for ``auto``.
    """
    new_id = _short_id if dialect == "mistral" else _long_id
    if choice.kind == "named":
        return _Named(new_id, choice.name)
    if choice.kind == "required":
        return _Required(new_id)
    names = choice.callable_names
    if dialect == "hermes":
        return _Tagged(new_id, names)
    return _Bare(new_id, names, "[" if dialect == "mistral" else "{")


def _long_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def _short_id() -> str:
    """Mistral's templates refuse every id that has not nine letters and digits."""
    return uuid4().hex[:9]


class _Named:
    """The whole text is the arguments."""

    def __init__(self, new_id: NewId, name: str) -> None:
        self._new_id = new_id
        self._name = name
        self.num_calls = 0

    def push(self, text: str) -> Delta:
        if self.num_calls:
            return Delta(calls=[ToolDelta(index=0, arguments=text)] if text else [])
        self.num_calls = 1
        call = ToolDelta(index=0, name=self._name, id=self._new_id(), arguments=text)
        return Delta(calls=[call])

    def finish(self) -> Delta:
        return Delta()


class _Required:
    """``[{"name": "f", "arguments": {...}}, ...]``, exactly so."""

    _HEAD = '{"name": "'
    _MIDDLE = '", "arguments": '

    def __init__(self, new_id: NewId) -> None:
        self.num_calls = 0
        self._new_id = new_id
        self._text = ""
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> Delta:
        delta = Delta()
        self._text += text
        while self._text:
            if self._depth == 0:
                middle = self._text.find(self._MIDDLE)
                start = middle + len(self._MIDDLE)
                if middle < 0 or len(self._text) == start:
                    break
                name = self._text[self._text.index(self._HEAD) + len(self._HEAD) : middle]
                call = ToolDelta(index=self.num_calls, name=name, id=self._new_id())
                self.num_calls += 1
                self._text = self._text[start:]
                delta.calls.append(call)
            piece = self._take_arguments()
            delta.calls.append(ToolDelta(index=self.num_calls - 1, arguments=piece))
        delta.calls = _joined(delta.calls)
        return delta

    def _take_arguments(self) -> str:
        """What there is of the arguments, up to their last brace."""
        for at, character in enumerate(self._text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    piece, self._text = self._text[: at + 1], self._text[at + 1 :]
                    return piece
        piece, self._text = self._text, ""
        return piece

    def finish(self) -> Delta:
        return Delta()


class _Tagged:
    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, new_id: NewId, names: Collection[str] | None) -> None:
        self.num_calls = 0
        self._new_id = new_id
        self._names = names
        self._text = ""

    def push(self, text: str) -> Delta:
        delta = Delta()
        self._text += text
        while True:
            start = self._text.find(self._OPEN)
            if start < 0:
                keep = _overlap(self._text, self._OPEN)
                cut = len(self._text) - keep
                delta.content += self._text[:cut]
                self._text = self._text[cut:]
                return delta
            end = self._text.find(self._CLOSE, start)
            if end < 0:
                delta.content += self._text[:start]
                self._text = self._text[start:]
                return delta
            delta.content += self._text[:start]
            inner = self._text[start + len(self._OPEN) : end]
            self._add(delta, inner, self._text[start : end + len(self._CLOSE)])
            self._text = self._text[end + len(self._CLOSE) :]

    def finish(self) -> Delta:
        delta, text = Delta(), self._text
        self._text = ""
        if text.startswith(self._OPEN):  # a model may end its turn instead of closing the tag
            self._add(delta, text.removeprefix(self._OPEN), text)
        else:
            delta.content = text
        return delta

    def _add(self, delta: Delta, inner: str, otherwise: str) -> None:
        calls = _calls_in(inner, self.num_calls, self._names, self._new_id)
        if calls is None:
            delta.content += otherwise
            return
        self.num_calls += len(calls)
        delta.calls += calls
        delta.content = delta.content.rstrip() if not delta.content.strip() else delta.content


class _Bare:
    """Calls are the whole answer; it begins with a bracket, or with a mark that may be shown."""

    _MARKS = ("<|python_tag|>", "[TOOL_CALLS]")

    def __init__(self, new_id: NewId, names: Collection[str] | None, bracket: str) -> None:
        self.num_calls = 0
        self._new_id = new_id
        self._names = names
        self._bracket = bracket
        self._text = ""
        self._is_text = False

    def push(self, text: str) -> Delta:
        if self._is_text:
            return Delta(text)
        self._text += text
        start = self._text.lstrip()
        may_call = start.startswith(self._bracket) or any(
            mark.startswith(start[: len(mark)]) for mark in self._MARKS
        )
        if not start or may_call:
            return Delta()
        self._is_text = True
        held, self._text = self._text, ""
        return Delta(held)

    def finish(self) -> Delta:
        text, self._text = self._text, ""
        inner = text.strip()
        for mark in self._MARKS:
            inner = inner.removeprefix(mark)
        calls = _calls_in(inner, 0, self._names, self._new_id)
        if calls is None:
            return Delta(text)
        self.num_calls = len(calls)
        return Delta(calls=calls)


def _joined(calls: list[ToolDelta]) -> list[ToolDelta]:
    """One delta for each call: the arguments that came together stand in one string."""
    joined: dict[int, ToolDelta] = {}
    for call in calls:
        before = joined.get(call.index)
        if before is None:
            joined[call.index] = call
        else:
            text = before.arguments + call.arguments
            joined[call.index] = ToolDelta(
                index=call.index, name=before.name, id=before.id, arguments=text
            )
    return list(joined.values())


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def _calls_in(
    text: str, first_index: int, names: Collection[str] | None, new_id: NewId
) -> list[ToolDelta] | None:
    """The calls that a text consists of; None if it is anything else, or calls what it may not."""
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except ValueError:
            return None
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip("; \n\t")
    calls = []
    for i, value in enumerate(found, first_index):
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            return None
        if names is not None and value["name"] not in names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(ToolDelta(index=i, name=value["name"], id=new_id(), arguments=text))
    return calls or None
