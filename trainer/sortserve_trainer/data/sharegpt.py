"""Conversations as ShareGPT has them, which LLaMA-Factory's data mostly are, as ``messages``.

``conversations`` is a list of turns of ``from`` and ``value``; ``system`` beside it is the turn
before them. A turn of ``function_call`` is one call, or a list of them, as JSON.
"""

from __future__ import annotations

import json
from typing import Any

from sortserve_trainer.data.rows import Row
from sortserve_trainer.data.source import bad_data

__all__ = ["CONVERSATIONS", "with_messages"]

CONVERSATIONS = "conversations"
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Other names are roles as they are."""


def with_messages(row: Row, turns: list[dict[str, Any]]) -> Row:
    """The same row with ``messages`` in place of its ``conversations``.

    Args:
        row: any row that has them.
        turns: of it; those that are messages already stay so.

    Raises:
        ConfigError: a call is not JSON; the message begins with the row's place.
    """
    messages = [_message(row.place, i, turn) for i, turn in enumerate(turns)]
    system = row.fields.get("system")
    if system and (not messages or messages[0].get("role") != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return Row(row.place, {**row.fields, "messages": messages})


def _message(place: str, index: int, turn: dict[str, Any]) -> dict[str, Any]:
    if "from" not in turn:
        return turn
    sender, value = turn["from"], turn.get("value")
    if sender != "function_call":
        role = _ROLES.get(sender, sender) if isinstance(sender, str) else sender
        return {"role": role, "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        problem = f"`{CONVERSATIONS}[{index}].value` is a call that is not JSON: {error}"
        raise bad_data(place, problem) from error
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
