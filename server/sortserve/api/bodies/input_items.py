"""Input items of ``POST /v1/responses`` as the messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sortserve.api.bodies.messages import ASSISTANT, not_allowed, read_content

__all__ = ["messages_of"]

_KINDS = "message, function_call or function_call_output"


def messages_of(items: Sequence[object], name: str) -> tuple[list[object], list[str]]:
    """Messages as chat has them, and where the client wrote each.

    Calls belong to the assistant's turn that they follow, or make one; each output is a message of
    role ``tool``. What stands in messages is checked by whoever reads them.

    Args:
        items: what the client sent, in its order.
        name: the field they came in.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of what is wrong.
    """
    messages: list[Any] = []
    places: list[str] = []
    names: dict[str, str] = {}  # of the functions that were called, by the id of the call
    for i, item in enumerate(items):
        place = f"{name}.{i}"
        kind = item.get("type", "message") if isinstance(item, Mapping) else "message"
        if not isinstance(item, Mapping):
            message: object = item
        elif kind == "message":
            message = {field: item.get(field) for field in ("role", "content")}
        elif kind == "function_call":
            call = _read_call(item, place)
            names[call["id"]] = call["function"]["name"]
            if messages and _is_assistants(messages[-1]):
                messages[-1].setdefault("tool_calls", []).append(call)
                continue
            message = {"role": ASSISTANT, "content": None, "tool_calls": [call]}
        elif kind == "function_call_output":
            message = _read_output(item, place, names)
        else:
            raise not_allowed(f"{place}.type", kind, _KINDS)
        messages.append(message)
        places.append(place)
    return messages, places


def _is_assistants(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") == ASSISTANT


def _read_call(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    function = {name: _text(item, name, place) for name in ("name", "arguments")}
    return {"id": _text(item, "call_id", place), "type": "function", "function": function}


def _read_output(item: Mapping[str, Any], place: str, names: Mapping[str, str]) -> dict[str, Any]:
    call_id = _text(item, "call_id", place)
    if call_id not in names:
        raise not_allowed(f"{place}.call_id", call_id, "that of a function_call before it")
    content = read_content({"content": item.get("output")}, "tool", f"{place}.output")
    return {"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": content}


def _text(item: Mapping[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or (not value and name != "arguments"):
        raise not_allowed(f"{place}.{name}", value, "a string")
    return value
