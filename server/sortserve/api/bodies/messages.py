"""What a message says: the forms of ``content`` that OpenAI's clients send."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from sortserve.api.bodies.limits import MAX_MESSAGE_FIELDS, MAX_PARTS
from sortserve.core.errors import InvalidRequestError, shortened
from sortserve.text.tool_calls import with_parsed_arguments

__all__ = ["check_length", "not_allowed", "read_calls", "read_content"]

ASSISTANT = "assistant"
TEXTS = ("text", "input_text", "output_text")
"""Types of parts that hold a text: of chat, and those of the responses API."""


def read_content(message: Mapping[str, Any], role: str, param: str) -> str | list[dict[str, Any]]:
    """A text, or parts of type text.

    A turn of the assistant may have none (it called a tool, or refused), and what it refused with
    is what it said.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of what is wrong.
    """
    content = message.get("content")
    if role == ASSISTANT and content is None:
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise not_allowed(param, content, "a string, or a list of parts of type text")
    check_length(content, param, MAX_PARTS, "parts")
    return [_read_part(part, role, f"{param}.{i}") for i, part in enumerate(content)]


def _read_part(part: object, role: str, param: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    is_refusal = role == ASSISTANT and kind == "refusal"
    if not isinstance(part, dict) or not (is_refusal or kind in TEXTS):
        raise not_allowed(param, part, 'parts of the form {"type": "text", "text"}')
    check_length(part, param, MAX_MESSAGE_FIELDS, "fields")
    name = "refusal" if is_refusal else "text"
    text = part.get(name)
    if not isinstance(text, str):
        raise not_allowed(f"{param}.{name}", text, "a string")
    return part if kind == "text" else {"type": "text", "text": text}


def read_calls(calls: object, param: str) -> list[dict[str, Any]]:
    """Calls of an earlier turn, their arguments as templates read them: as objects.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of what is wrong.
    """
    if not isinstance(calls, list):
        raise not_allowed(param, calls, "a list of calls")
    check_length(calls, param, MAX_PARTS, "calls")
    read = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise not_allowed(f"{param}.{i}", call, "an object with a function and its name")
        read.append({**call, "function": with_parsed_arguments(function)})
    return read


def check_length(value: Sized, param: str, most: int, what: str) -> None:
    """Refuse what is too long.

    Raises:
        InvalidRequestError: ``param`` is given.
    """
    if len(value) > most:
        raise InvalidRequestError(
            f"{param} has {len(value)} {what}; {most} are allowed.", param=param
        )


def not_allowed(param: str, value: object, allowed: str) -> InvalidRequestError:
    """The refusal of a value, saying what would do."""
    return InvalidRequestError(
        f"{param}={shortened(value)} is not allowed: it must be {allowed}.", param=param
    )
