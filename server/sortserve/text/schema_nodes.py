"""The subschemas of a JSON schema, and how they lead to each other (no library)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

__all__ = ["Node", "children", "needed_first", "target", "walk"]

_MAPS = ("$defs", "definitions", "properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("additionalProperties", "items", "additionalItems")
Node = tuple[str, Any]
"""A subschema and its place, in dots."""


def children(node: object) -> Iterator[Node]:
    """The subschemas right below one, each with its place in it."""
    if not isinstance(node, Mapping):
        return
    for word in _MAPS:
        if isinstance(node.get(word), Mapping):
            for name, child in node[word].items():
                yield f"{word}.{name}", child
    for word in _LISTS:
        if isinstance(node.get(word), list):
            for i, child in enumerate(node[word]):
                yield f"{word}.{i}", child
    for word in _SINGLE:
        if isinstance(node.get(word), Mapping):
            yield word, node[word]


def walk(root: object, place: str) -> Iterator[Node]:
    """Each subschema once, the root first; and what references mean, wherever it stands."""
    pending = [(place, root)]
    seen: set[int] = set()
    while pending:
        at, node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield at, node
        if isinstance(node, Mapping) and isinstance(node.get("$ref"), str):
            meant = target(root, node["$ref"])
            if meant is not None:
                pending.append((f"{place}.{node['$ref'][2:].replace('/', '.')}".rstrip("."), meant))
        pending += [(f"{at}.{name}", child) for name, child in children(node)]


def needed_first(root: object, nodes: Sequence[Node]) -> list[Any]:
    """All schemas that the root leads to, each after those that it leads to, but for circles.

    Args:
        root: where references begin.
        nodes: all subschemas; what a reference means besides is none.
    """
    known = {id(node) for _, node in nodes}
    ordered: list[Any] = []
    seen = {id(root)}
    pending = [(root, _needed(root, root))]
    while pending:
        node, needed = pending[-1]
        for other in needed:
            if id(other) in known and id(other) not in seen:
                seen.add(id(other))
                pending.append((other, _needed(root, other)))
                break
        else:
            ordered.append(node)
            pending.pop()
    return ordered


def _needed(root: object, node: object) -> Iterator[Any]:
    for _, child in children(node):
        yield child
    if isinstance(node, Mapping) and isinstance(node.get("$ref"), str):
        yield target(root, node["$ref"])


def target(root: object, reference: str) -> Any:
    """The schema that a reference means; None: no part of this document."""
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return None
    node: Any = root
    for part in unquote(reference[2:]).split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node
