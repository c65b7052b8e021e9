"""How long the shortest document of a JSON schema is (no library)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sortserve.text.schema_nodes import target

__all__ = ["MAX_SHORTEST_CHARS", "Shortest"]

MAX_SHORTEST_CHARS = 16_384
"""Of the shortest document that a schema allows: about as many tokens are forced at most."""
MAX_ROUNDS = 16
"""Passes over all schemas to find the shortest document. Without circles of ``$ref`` two do; no
circle that people write needs more than a few."""


class Shortest:
    """How many characters a schema's shortest document has at least: a least fixed point.

    Every schema starts without a document, and gets one as soon as all that it needs have one.
    What is not understood counts as a single character: the compiler will have its say.

    Args:
        root: where references begin.
        ordered: all schemas that it leads to, each after those that it leads to.
    """

    def __init__(self, root: object, ordered: Sequence[Any]) -> None:
        self._root = root
        self._ordered = ordered
        self._chars: dict[int, float] = {id(node): math.inf for node in ordered}

    def chars(self) -> float | None:
        """Exact where it is too many, else a bound.

        None: too many references lead back to schemas around them to tell.
        """
        for _ in range(MAX_ROUNDS):
            changed = False
            for node in self._ordered:
                chars = self._of(node)
                if chars < self._chars[id(node)]:
                    self._chars[id(node)], changed = chars, True
            if not changed or self._chars[id(self._root)] <= MAX_SHORTEST_CHARS:
                return self._chars[id(self._root)]
        return None

    def _known(self, node: object) -> float:
        return self._chars.get(id(node), 1.0)

    def _of(self, node: object) -> float:
        if not isinstance(node, Mapping):
            return 1.0
        bounds = [1.0]
        if "const" in node:
            bounds.append(len(json.dumps(node["const"])))
        if isinstance(node.get("enum"), list) and node["enum"]:
            bounds.append(min(len(json.dumps(value)) for value in node["enum"]))
        for word in ("anyOf", "oneOf"):
            if isinstance(node.get(word), list) and node[word]:
                bounds.append(min(map(self._known, node[word])))
        if isinstance(node.get("allOf"), list):
            bounds += map(self._known, node["allOf"])
        if isinstance(node.get("$ref"), str):
            bounds.append(self._known(target(self._root, node["$ref"])))
        types = node.get("type")
        names = types if isinstance(types, list) else [types]
        bounds.append(min((self._of_type(node, name) for name in names), default=1.0))
        return max(bounds)

    def _of_type(self, node: Mapping[str, Any], name: object) -> float:
        if name == "string":
            return 2.0 + _count(node, "minLength")
        if name == "array":
            return 2.0 + self._of_items(node)
        if name == "object":
            required = node.get("required")
            names = required if isinstance(required, list) else []
            properties = node.get("properties")
            known = properties if isinstance(properties, Mapping) else {}
            fields = [3.0 + len(key) + self._known(known.get(key, True)) for key in map(str, names)]
            return 2.0 + max(sum(fields), 4.0 * _count(node, "minProperties"))
        return 1.0

    def _of_items(self, node: Mapping[str, Any]) -> float:
        least = _count(node, "minItems")
        first = node.get("prefixItems", node.get("items"))
        prefix = first[: int(least)] if isinstance(first, list) else []
        rest = least - len(prefix)
        items = node.get("items") if not isinstance(node.get("items"), list) else True
        rest_chars = rest * (1.0 + self._known(items)) if rest > 0 else 0.0
        return sum(1.0 + self._known(item) for item in prefix) + rest_chars


def _count(node: Mapping[str, Any], word: str) -> float:
    value = node.get(word)
    return float(value) if isinstance(value, int) and 0 <= value < 1 << 53 else 0.0
