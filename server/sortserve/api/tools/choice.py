"""What a request asks of the model where it offers tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sortserve.api.bodies.messages import not_allowed
from sortserve.api.tools.offered import CHAT, Spelling, Tool, read_tools
from sortserve.core.errors import InvalidRequestError
from sortserve.core.grammar import OutputFormat

__all__ = ["ToolChoice", "read_tool_choice", "require_dialect"]

MAX_CALLS = 16
"""Calls in one answer that must have some."""
_VALUES = ("const", "enum", "default", "examples")
"""Words of a schema that hold values, and no schemas."""
_MAPS = ("$defs", "definitions", "properties", "patternProperties")
_MODES = ("none", "auto", "required")
_ALLOWED = "none, auto, required, or an object of type function or allowed_tools"


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """What a request asks of the model."""

    kind: str
    """``none``, ``auto``, ``required`` or ``named``."""
    tools: Sequence[Tool] = ()
    """Those that the model may call, and is told of."""
    name: str = ""
    """Of the function that must be called, where one is named."""
    is_parallel: bool = True
    """Whether an answer may hold several calls."""
    is_narrowed: bool = False
    """The request offers other tools, too, and allows these alone."""

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.kind in ("required", "named")

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is told of the tools."""
        if self.kind == "none":
            return {}
        return {"tools": [dict(tool.written) for tool in self.tools]}

    @property
    def callable_names(self) -> frozenset[str] | None:
        """The functions whose calls are calls; None: any, and the client sees to it."""
        return frozenset(tool.name for tool in self.tools) if self.is_narrowed else None

    def output_format(self) -> OutputFormat | None:
        """The form of an answer that must be a call; None: it has none.

        That of a named function is its arguments alone; else it is a list of objects with ``name``
        and ``arguments``.
        """
        if self.kind == "named":
            [tool] = [tool for tool in self.tools if tool.name == self.name]
            return OutputFormat("json", json.dumps(tool.parameters), tool.place)
        if self.kind == "required":
            return OutputFormat("json", json.dumps(self._calls_schema()), "tools", self._places)
        return None

    @property
    def _places(self) -> tuple[tuple[str, str], ...]:
        """Where a client wrote what stands elsewhere in the schema of all calls."""
        places = [(f"tools.$defs.tool{i}", tool.place) for i, tool in enumerate(self.tools)]
        return tuple(reversed(places))  # last first, as tool1 begins tool10, too

    def _calls_schema(self) -> dict[str, Any]:
        """Each function's parameters become a definition, and references in them follow."""
        calls, definitions = [], {}
        for i, tool in enumerate(self.tools):
            definitions[f"tool{i}"] = _moved(tool.parameters, f"#/$defs/tool{i}")
            fields = {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/tool{i}"}}
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
    tools: Sequence[Any] | None, choice: object, parallel: bool | None, spelling: Spelling = CHAT
) -> ToolChoice:
    """What a request asks of the model, from its three fields.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    offered = read_tools(tools, spelling)
    asked = _read_choice(choice, offered, spelling)
    if asked.kind != "none" and not offered:
        if asked.kind == "auto":
            return ToolChoice(kind="none")
        raise InvalidRequestError(
            "tool_choice needs tools, and there are none.", param="tool_choice"
        )
    return ToolChoice(
        kind=asked.kind,
        tools=asked.tools,
        name=asked.name,
        is_parallel=parallel is not False,
        is_narrowed=asked.is_narrowed,
    )


def require_dialect(choice: ToolChoice, dialect: str | None) -> None:
    """Refuse to leave calls to a model whose template knows none that can be read.

    Raises:
        InvalidRequestError: ``param`` is ``tool_choice``.
    """
    if choice.kind == "auto" and dialect is None:
        raise InvalidRequestError(
            "tool_choice=auto is not possible: the chat template of this checkpoint knows no tools "
            "in a form that can be read (Hermes, Qwen, Llama 3, Mistral). Send tool_choice "
            "required, none, or a function's name.",
            param="tool_choice",
        )


def _read_choice(choice: object, offered: Sequence[Tool], spelling: Spelling) -> ToolChoice:
    if choice is None:
        return ToolChoice(kind="auto" if offered else "none", tools=offered)
    if isinstance(choice, str) and choice in _MODES:
        return ToolChoice(kind=choice, tools=offered)
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if isinstance(choice, Mapping) and kind == "function":
        name = _read_name(choice, "tool_choice", offered, spelling)
        return ToolChoice(kind="named", tools=offered, name=name)
    if isinstance(choice, Mapping) and kind == "allowed_tools":
        return _read_allowed(choice, offered, spelling)
    raise not_allowed("tool_choice", choice, _ALLOWED)


def _read_allowed(
    choice: Mapping[str, Any], offered: Sequence[Tool], spelling: Spelling
) -> ToolChoice:
    """Some of the tools, which the model may (``auto``) or must (``required``) call."""
    allowed, place = spelling.allowed_tools(choice, "tool_choice")
    if not isinstance(allowed, Mapping):
        raise not_allowed(place, allowed, "an object with a mode and tools")
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise not_allowed(f"{place}.mode", mode, "auto or required")
    if not isinstance(tools, list) or not tools or len(tools) > len(offered):
        raise not_allowed(f"{place}.tools", tools, "a list of tools that are offered, each once")
    names = [
        _read_name(tool, f"{place}.tools.{i}", offered, spelling) for i, tool in enumerate(tools)
    ]
    kept = [tool for tool in offered if tool.name in names]
    return ToolChoice(kind=str(mode), tools=kept, is_narrowed=True)


def _read_name(value: object, param: str, offered: Sequence[Tool], spelling: Spelling) -> str:
    """The name in a reference to a function, which must be offered."""
    if not isinstance(value, Mapping) or value.get("type", "function") != "function":
        raise not_allowed(param, value, 'an object of type "function"')
    function, place = spelling.function(value, param)
    if not isinstance(function, Mapping):
        raise not_allowed(place, function, "an object with a name")
    names = [tool.name for tool in offered]
    name = function.get("name")
    if name not in names:
        raise not_allowed(f"{place}.name", name, f"one of {names}")
    return str(name)


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
