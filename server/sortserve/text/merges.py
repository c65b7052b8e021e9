"""How many patterns a JSON schema asks of one value: the compiler's work doubles with each.

What stands under one ``allOf``, and behind a ``$ref``, holds for the same value, and so does what
is said there of a property of the same name. No library is needed to count it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sortserve.core.errors import InvalidRequestError
from sortserve.text.schema_nodes import Node, target

__all__ = ["MAX_PATTERNS", "check_merges"]

MAX_PATTERNS = 8
"""Patterns and formats of one value: ten take the compiler milliseconds, twenty half a minute."""
MAX_STEPS = 64
"""From an ``allOf`` to what it merges, through references and alternatives."""
MAX_MERGED = 20_000
"""Schemas looked at, each once for every ``allOf`` around it."""
_ANY_NAME = "*"

Fields = dict[str, list[Any]]
"""What holds for a property at once, by its name; items are one of theirs."""


def check_merges(root: object, nodes: Sequence[Node], ordered: Sequence[Any]) -> None:
    """Refuse a schema that asks for too many patterns of one value.

    Args:
        root: where references begin.
        nodes: all subschemas and their places.
        ordered: those that the root leads to, each after those that it leads to.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    merges = _Merges(root, ordered)
    for place, node in nodes:
        if not merges.is_fair(node):
            raise InvalidRequestError(
                f"{place} asks for more than {MAX_PATTERNS} patterns and formats of one value, or "
                f"merges more than {MAX_MERGED} schemas.",
                param=place,
            )


class _Merges:
    def __init__(self, root: object, ordered: Sequence[Any]) -> None:
        self._root = root
        self._left = MAX_MERGED
        self._patterns: dict[int, int] = {}
        for node in ordered:
            self._patterns[id(node)] = self._count(node)

    def is_fair(self, node: object) -> bool:
        if self._patterns.get(id(node), 0) > MAX_PATTERNS:
            return False
        if not isinstance(node, Mapping) or "allOf" not in node:
            return True
        return self._groups_are_fair(self._fields(node, MAX_STEPS))

    def _groups_are_fair(self, fields: Fields) -> bool:
        pending = [fields]
        while pending and self._left >= 0:
            for group in pending.pop().values():
                if len(group) > 1:
                    if self._sum(group) > MAX_PATTERNS:
                        return False
                    pending.append(self._fields({"allOf": group}, MAX_STEPS))
        return self._left >= 0

    def _count(self, node: object) -> int:
        if not isinstance(node, Mapping):
            return 0
        own = sum(isinstance(node.get(word), str) for word in ("pattern", "format"))
        most = [self._sum([part]) for part in _alternatives(node)]
        return own + self._sum(self._parts(node)) + max(most, default=0)

    def _sum(self, nodes: Sequence[Any]) -> int:
        return sum(self._patterns.get(id(node), 0) for node in nodes)

    def _parts(self, node: Mapping[str, Any]) -> list[Any]:
        """What holds for the same value besides a schema itself."""
        parts = list(node["allOf"]) if isinstance(node.get("allOf"), list) else []
        if isinstance(node.get("$ref"), str):
            parts.append(target(self._root, node["$ref"]))
        return parts

    def _fields(self, node: object, steps: int) -> Fields:
        self._left -= 1
        if not isinstance(node, Mapping) or self._left < 0:
            return {}
        if steps == 0:
            self._left = -1
            return {}
        merged = dict(_own_fields(node))
        for part in self._parts(node):
            merged = _both(merged, self._fields(part, steps - 1))
        widest: Fields = {}
        for part in _alternatives(node):
            for name, group in self._fields(part, steps - 1).items():
                if self._sum(group) >= self._sum(widest.get(name, [])):
                    widest[name] = group
        return _both(merged, widest)


def _own_fields(node: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(node.get("properties"), Mapping):
        for name, child in node["properties"].items():
            yield f".{name}", [child]
    rest = [node[word] for word in ("items", "additionalProperties") if word in node]
    if isinstance(node.get("patternProperties"), Mapping):
        rest += node["patternProperties"].values()
    if isinstance(node.get("prefixItems"), list):
        rest += node["prefixItems"]
    if rest:
        yield _ANY_NAME, rest[:1] if len(rest) == 1 else [{"anyOf": rest}]


def _both(one: Fields, other: Fields) -> Fields:
    """What holds where both do: what is said of any name holds for those of the other, too."""
    merged: Fields = {}
    for name in {**one, **other}:
        rest = (one.get(_ANY_NAME, []), other.get(_ANY_NAME, []))
        merged[name] = [*one.get(name, rest[0]), *other.get(name, rest[1])]
    return merged


def _alternatives(node: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for word in ("anyOf", "oneOf"):
        if isinstance(node.get(word), list):
            parts += node[word]
    return parts
