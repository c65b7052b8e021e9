"""Which tools a request offers, and what it asks of the model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sortserve.core.errors import InvalidRequestError, shortened
from sortserve.core.grammar import OutputFormat

__all__ = ["ToolChoice", "read_tool_choice"]

MAX_CALLS = 16
"""Calls in one answer that must have some."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_VALUES = ("const", "enum", "default", "examples")
"""Words of a schema that hold values, and no schemas."""
_MAPS = ("$defs", "definitions", "properties", "patternProperties")
_ALLOWED = 'none, auto, required or {"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """What a request asks of the model."""

    kind: str
    """``none``, ``auto``, ``required`` or ``named``."""
    tools: Sequence[Mapping[str, Any]] = ()
    """As the client wrote them, for the chat template."""
    name: str = ""
    """Of the function that must be called, where one is named."""
    is_parallel: bool = True
    """Whether an answer may hold several calls."""

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.kind in ("required", "named")

    def output_format(self) -> OutputFormat | None:
        """The form of an answer that must be a call; None: it has none.

        That of a named function is its arguments alone; else it is a list of objects with ``name``
        and ``arguments``.
        """
        if self.kind == "named":
            [i] = [i for i, name in enumerate(self._names) if name == self.name]
            schema = _parameters(self.tools[i])
            return OutputFormat("json", json.dumps(schema), f"tools.{i}.function.parameters")
        if self.kind == "required":
            return OutputFormat("json", json.dumps(self._calls_schema()), "tools", self._places)
        return None

    @property
    def _places(self) -> tuple[tuple[str, str], ...]:
        """Where a client wrote what stands elsewhere in the schema of all calls."""
        last_first = reversed(range(len(self.tools)))  # tool1 begins tool10, too
        return tuple((f"tools.$defs.tool{i}", f"tools.{i}.function.parameters") for i in last_first)

    @property
    def _names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]

    def _calls_schema(self) -> dict[str, Any]:
        """Each function's parameters become a definition, and references in them follow."""
        calls, definitions = [], {}
        for i, (name, tool) in enumerate(zip(self._names, self.tools, strict=True)):
            definitions[f"tool{i}"] = _moved(_parameters(tool), f"#/$defs/tool{i}")
            fields = {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/tool{i}"}}
            calls.append(
                {
                    "type": "object",
                    "properties": fields,
                    "required": list(fields),
                    "additionalProperties": False,
                }
            )
        most = MAX_CALLS if self.is_parallel else 1
        return {
            "$defs": definitions,
            "type": "array",
            "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
            "minItems": 1,
            "maxItems": most,
        }


def read_tool_choice(
    tools: Sequence[Any] | None, choice: object, parallel: bool | None
) -> ToolChoice:
    """What a chat request asks of the model, from its three fields.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    known = [_read_tool(tool, f"tools.{i}") for i, tool in enumerate(tools or ())]
    names = [tool["function"]["name"] for tool in known]
    if len(set(names)) < len(names):
        raise InvalidRequestError("tools has two functions of one name.", param="tools")
    kind, name = _read_choice(choice, names)
    if kind is None:
        kind = "auto" if known else "none"
    if kind != "none" and not known:
        if kind == "auto":
            return ToolChoice(kind="none")
        raise InvalidRequestError(
            "tool_choice needs tools, and there are none.", param="tool_choice"
        )
    return ToolChoice(kind=kind, tools=known, name=name, is_parallel=parallel is not False)


def _read_choice(choice: object, names: Sequence[str]) -> tuple[str | None, str]:
    if choice is None:
        return None, ""
    if choice in ("none", "auto", "required"):
        return str(choice), ""
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(choice, Mapping) or choice.get("type") != "function" or not name:
        raise _not_allowed("tool_choice", choice, _ALLOWED)
    if name not in names:
        raise _not_allowed("tool_choice.function.name", name, f"one of {list(names)}")
    return "named", str(name)


def _read_tool(tool: object, param: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise _not_allowed(param, tool, 'an object of type "function"')
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _not_allowed(f"{param}.function", function, "an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        allowed = "1 to 64 letters, digits, dots, dashes and underscores"
        raise _not_allowed(f"{param}.function.name", name, allowed)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise _not_allowed(f"{param}.function.parameters", parameters, "a JSON schema")
    return tool


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: always an object."""
    parameters = tool["function"].get("parameters") or {"properties": {}}
    if parameters.get("type", "object") == "object" and "$ref" not in parameters:
        return {"type": "object", **parameters}
    return dict(parameters)


def _moved(schema: Any, root: str, *, is_map: bool = False) -> Any:
    """The same schema where its root stands elsewhere in a document.

    Args:
        schema: or a list of some, or a mapping of names to some.
        root: the new place.
        is_map: its names are a client's own words.
    """
    if isinstance(schema, list):
        return [_moved(value, root) for value in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {
        name: value
        if name in _VALUES and not is_map
        else _moved(value, root, is_map=name in _MAPS and not is_map)
        for name, value in schema.items()
    }
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and not is_map:
        moved["$ref"] = root + reference[1:]
    return moved


def _not_allowed(param: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}={shortened(value)} is not allowed: it must be {allowed}.", param=param
    )
