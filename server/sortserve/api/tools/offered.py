"""The functions that a request offers to the model, as its route spells them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sortserve.api.bodies.messages import not_allowed
from sortserve.core.errors import InvalidRequestError

__all__ = ["CHAT", "RESPONSES", "Spelling", "Tool", "read_tools"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Spelling:
    """How a route writes tools and choices of them."""

    inner: str | None
    """The field that holds a function's name and parameters; None: they lie open in the tool."""
    allowed: str | None
    """The field that holds the functions of ``allowed_tools``; None: they lie open, too."""

    def function(self, tool: Mapping[str, Any], param: str) -> tuple[object, str]:
        """What has the name and the parameters of a function, and its place."""
        return _opened(tool, self.inner, param)

    def allowed_tools(self, choice: Mapping[str, Any], param: str) -> tuple[object, str]:
        """What has the mode and the tools of a choice that allows some, and its place."""
        return _opened(choice, self.allowed, param)


CHAT = Spelling(inner="function", allowed="allowed_tools")
RESPONSES = Spelling(inner=None, allowed=None)


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One function."""

    name: str
    parameters: Mapping[str, Any]
    """The schema of its arguments, which are always an object."""
    place: str
    """Where the client wrote the parameters."""
    written: Mapping[str, Any]
    """As chat templates read it."""


def read_tools(tools: Sequence[Any] | None, spelling: Spelling) -> list[Tool]:
    """The functions of a request.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    read = [_read_tool(tool, f"tools.{i}", spelling) for i, tool in enumerate(tools or ())]
    if len({tool.name for tool in read}) < len(read):
        raise InvalidRequestError("tools has two functions of one name.", param="tools")
    return read


def _read_tool(tool: object, param: str, spelling: Spelling) -> Tool:
    if not isinstance(tool, dict):
        raise not_allowed(param, tool, 'an object of type "function"')
    if tool.get("type", "function") != "function":
        raise not_allowed(f"{param}.type", tool["type"], "function")
    function, place = spelling.function(tool, param)
    if not isinstance(function, dict):
        raise not_allowed(place, function, "an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        allowed = "1 to 64 letters, digits, dots, dashes and underscores"
        raise not_allowed(f"{place}.name", name, allowed)
    parameters = _read_parameters(function.get("parameters"), f"{place}.parameters")
    inside = {key: value for key, value in function.items() if key != "type"}
    return Tool(
        name=name,
        parameters=parameters,
        place=f"{place}.parameters",
        written=tool if function is not tool else {"type": "function", "function": inside},
    )


def _read_parameters(value: object, param: str) -> dict[str, Any]:
    """A schema of objects alone, as the arguments of a call are by name.

    A function that leaves its parameters out has none, as OpenAI reads it.
    """
    if value is None:
        return dict(_NO_PARAMETERS)
    if not isinstance(value, dict):
        raise not_allowed(param, value, "a JSON schema")
    kind = value.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise not_allowed(f"{param}.type", kind, "object: arguments have names")
    return {**value, "type": "object"}


def _opened(value: Mapping[str, Any], name: str | None, param: str) -> tuple[object, str]:
    return (value, param) if name is None else (value.get(name), f"{param}.{name}")
