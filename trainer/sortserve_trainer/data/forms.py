"""The forms that a row of data may have, and what each becomes.

| form | columns | becomes |
|---|---|---|
| chat | ``messages``: a list of ``role`` and ``content``; may have ``tools`` | the conversation |
| ShareGPT | ``conversations``: of ``from``, ``value``; may have ``system``, ``tools`` | the same |
| Alpaca | ``instruction``, ``output``; may have ``input``, ``system``, ``history`` | the same |
| question | ``question``, ``answers`` or ``target`` | one question and its answer |
| text | ``text`` | a plain document |

The first form whose columns are there counts; other columns are ignored, and null is absent.
Turns have any role that the base's chat template knows, ``system`` and ``tool`` among them; one of
the assistant may have ``tool_calls``, as the OpenAI API writes them, with or without ``content``.
Lists may be JSON in a string, since the columns of CSV hold nothing else.
A conversation with a ``finish_reason`` was generated, as ``selfdata --keep-all`` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sortserve.text.tool_calls import with_parsed_arguments
from sortserve_trainer.data.rows import Row, json_kind
from sortserve_trainer.data.sharegpt import CONVERSATIONS, with_messages
from sortserve_trainer.data.source import bad_data

__all__ = ["Conversation", "Document", "parse_question", "parse_row"]

_FORMS = (
    "a row has `messages`, or `conversations`, or `instruction` and `output` (and `input`), "
    "or `question` and `answers` (and `target`), or `text`"
)


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat; the last one is an answer to learn."""

    place: str
    messages: list[dict[str, Any]]
    """``role`` and ``content`` of each turn, and what else the template reads of it."""
    finish_reason: str | None = None
    """How the generation of its last answer ended; None if nobody says it was generated."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call."""

    @property
    def is_generated(self) -> bool:
        """Whether the answers are a model's own, so that where they repeat is not to be learned."""
        return self.finish_reason is not None

    @property
    def is_cut(self) -> bool:
        """Whether the last answer was stopped, so that its end is not to be learned."""
        return self.finish_reason == "length"

    @property
    def answer_turns(self) -> list[int]:
        """Which turns are answers to learn: the assistant's, but for empty ones."""
        return [i for i, message in enumerate(self.messages) if _is_answer(message)]


@dataclass(frozen=True)
class Document:
    """Plain text, all of which is to be learned."""

    place: str
    text: str


def parse_row(row: Row, end_tokens: tuple[str, ...]) -> Conversation | Document | None:
    """What a row says; None where its answer, or its text, is empty.

    Args:
        row: any row of a source.
        end_tokens: strings that data sets write at the end of an answer and that are no part of it.

    Raises:
        ConfigError: the row has none of the forms; the message begins with its place.
    """
    row = _without_nulls(row)
    parsed = _parse_form(row, end_tokens)
    if isinstance(parsed, Conversation) and "finish_reason" in row.fields:
        return replace(parsed, finish_reason=_text(row, "finish_reason"))
    return parsed


def parse_question(row: Row) -> str:
    """What a row of the question or the Alpaca form asks; an answer beside it is ignored.

    Raises:
        ConfigError: the row has neither form; the message begins with its place.
    """
    row = _without_nulls(row)
    if "question" in row.fields:
        return _text(row, "question").strip()
    if "instruction" in row.fields:
        return _instruction(row)
    raise bad_data(row.place, "a row has no `question` or `instruction` (and `input`) to answer")


def _without_nulls(row: Row) -> Row:
    return Row(row.place, {name: v for name, v in row.fields.items() if v is not None})


def _parse_form(row: Row, end_tokens: tuple[str, ...]) -> Conversation | Document | None:
    columns = row.fields.keys()
    if "messages" in columns:
        return _parse_chat(row, end_tokens)
    if CONVERSATIONS in columns:
        turns = _parse_list(row.place, CONVERSATIONS, row.fields[CONVERSATIONS])
        return _parse_chat(with_messages(row, turns), end_tokens)
    if "instruction" in columns and "output" in columns:
        answered = _question_and_answer(
            row.place, _instruction(row), _text(row, "output"), end_tokens
        )
        return answered and replace(answered, messages=[*_before(row), *answered.messages])
    if "question" in columns and ("answers" in columns or "target" in columns):
        question = _text(row, "question").strip()
        return _question_and_answer(row.place, question, _first_answer(row), end_tokens)
    if "text" in columns:
        text = _without_end(_text(row, "text"), end_tokens)
        return Document(row.place, text) if text.strip() else None
    names = ", ".join(f"`{name}`" for name in columns) or "no columns"
    raise bad_data(row.place, f"{names}: none of the forms of a row: {_FORMS}")


def _parse_chat(row: Row, end_tokens: tuple[str, ...]) -> Conversation | None:
    turns = _parse_list(row.place, "messages", row.fields["messages"])
    messages = [_parse_turn(row.place, i, turn) for i, turn in enumerate(turns)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise bad_data(row.place, "`messages` has no turn of the role `assistant` to learn from")
    if roles[0] == "assistant":
        raise bad_data(row.place, "`messages` begins with an answer: put a user turn before it")
    for message in messages:
        if message["role"] == "assistant":
            message["content"] = _without_end(message["content"], end_tokens)
    while messages and not _is_answer(messages[-1]):
        messages.pop()  # nothing after the last answer is ever looked at
    if not messages:
        return None
    tools = _parse_list(row.place, "tools", row.fields["tools"]) if "tools" in row.fields else None
    return Conversation(row.place, messages, tools=tools or None)


def _parse_turn(place: str, index: int, turn: Mapping[str, Any]) -> dict[str, Any]:
    name = f"messages[{index}]"
    calls = turn.get("tool_calls")
    # A turn that calls tools need not say anything.
    content = "" if calls and turn.get("content") is None else turn.get("content")
    parsed: dict[str, Any] = {
        "role": _check_text(place, f"{name}.role", turn.get("role")),
        "content": _check_text(place, f"{name}.content", content),
    }
    if calls:
        calls = _parse_list(place, f"{name}.tool_calls", calls)
        parsed["tool_calls"] = [_parse_call(call) for call in calls]
    for other in ("tool_call_id", "name"):
        if turn.get(other) is not None:
            parsed[other] = _check_text(place, f"{name}.{other}", turn[other])
    return parsed


def _parse_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call as the server, too, gives it to a template; its function may lie open in it."""
    function = call.get("function", call)
    if not isinstance(function, dict):
        return call
    parsed = with_parsed_arguments(function)
    return {**call, "function": parsed} if "function" in call else parsed


def _parse_list(place: str, name: str, value: object) -> list[dict[str, Any]]:
    """A list of objects."""
    items = _as_list(place, name, value)
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise bad_data(place, f"`{name}[{i}]` is {json_kind(item)}, not an object")
    return items


def _as_list(place: str, name: str, value: object) -> list[Any]:
    """A list; as JSON in a string too, for files whose columns hold none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise bad_data(place, f"`{name}` is a string that is not JSON: {error}") from error
    if not isinstance(value, list):
        raise bad_data(place, f"`{name}` is {json_kind(value)}, not a list")
    return value


def _question_and_answer(
    place: str, question: str, answer: str, end_tokens: tuple[str, ...]
) -> Conversation | None:
    answer = _without_end(answer, end_tokens).strip()
    if not answer:
        return None
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return Conversation(place, messages)


def _instruction(row: Row) -> str:
    optional_input = _text(row, "input") if "input" in row.fields else ""
    return _join_paragraphs(_text(row, "instruction"), optional_input)


def _before(row: Row) -> list[dict[str, Any]]:
    """What an Alpaca row says came before its question, as LLaMA-Factory has it: ``system``, and in
    ``history`` pairs of a question and its answer.
    """
    system = _text(row, "system") if "system" in row.fields else ""
    turns = [{"role": "system", "content": system}] if system.strip() else []
    history = _as_list(row.place, "history", row.fields.get("history", []))
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise bad_data(row.place, f"`history[{i}]` is not a pair of a question and its answer")
        for j, role in enumerate(("user", "assistant")):
            content = _check_text(row.place, f"history[{i}][{j}]", pair[j])
            turns.append({"role": role, "content": content})
    return turns


def _first_answer(row: Row) -> str:
    """``target``, which is one of the answers and the likeliest, else the first of them."""
    if "target" in row.fields:
        return _text(row, "target")
    answers = row.fields["answers"]
    if not isinstance(answers, list):
        return _text(row, "answers")
    return _check_text(row.place, "answers[0]", answers[0]) if answers else ""


def _is_answer(message: Mapping[str, Any]) -> bool:
    says_something = bool(message["content"].strip()) or bool(message.get("tool_calls"))
    return message["role"] == "assistant" and says_something


def _join_paragraphs(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _without_end(text: str, end_tokens: Iterable[str]) -> str:
    stripped = text.rstrip()
    for token in end_tokens:
        if stripped.endswith(token):
            return _without_end(stripped.removesuffix(token), end_tokens)
    return text


def _text(row: Row, name: str) -> str:
    return _check_text(row.place, name, row.fields[name])


def _check_text(place: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise bad_data(place, f"`{name}` is {json_kind(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"`{name}` is not valid Unicode: character {error.start} is half a surrogate pair"
        raise bad_data(place, problem) from None
    return value
