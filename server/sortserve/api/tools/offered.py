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
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise not_allowed(f"{place}.parameters", parameters, "a JSON schema")
    inside = {key: value for key, value in function.items() if key != "type"}
    return Tool(
        name=name,
        parameters=_as_object(parameters or {"properties": {}}),
        place=f"{place}.parameters",
        written=tool if function is not tool else {"type": "function", "function": inside},
    )


def _as_object(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema, where it leaves that out, said to be one of objects."""
    if parameters.get("type", "object") == "object" and "$ref" not in parameters:
        return {"type": "object", **parameters}
    return parameters


def _opened(value: Mapping[str, Any], name: str | None, param: str) -> tuple[object, str]:
    return (value, param) if name is None else (value.get(name), f"{param}.{name}")
