"""What is looked at in a JSON schema before it is compiled (no library).

Words of older drafts, or of other dialects, that bound a document and that the compiler would pass
over are refused by name, with their place. So is what would take it long, and a schema whose
shortest document is out of all proportion, or has no end.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from sortserve.core.errors import InvalidRequestError, shortened

__all__ = ["check_expression", "check_schema", "children"]

MAX_SHORTEST_CHARS = 16_384
"""Of the shortest document that a schema allows: about as many tokens are forced at most."""
MAX_MULTIPLE = 10_000
"""Product of all ``multipleOf``, without their decimal points: their compiler counts remainders."""

MAX_ROUNDS = 16
"""Passes over all schemas to find the shortest document. Without circles of ``$ref`` two do; no
circle that people write needs more than a few."""

MAX_EXPANDED = 20_000
"""Characters of a regular expression with its counted repetitions written out."""

_MAPS = ("$defs", "definitions", "properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("additionalProperties", "items", "additionalItems")
_PASSED_OVER = {
    "divisibleBy": "use multipleOf",
    "extends": "use allOf",
    "disallow": "it is not supported",
    "discriminator": "",  # an annotation of OpenAPI
    "x-guidance": "the server sets it",
}

_COUNT = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")

Node = tuple[str, Any]
"""A subschema and its place, in dots."""


def check_schema(schema: object, param: str) -> None:
    """Refuse what the compiler would pass over, or take too long for.

    Args:
        schema: parsed.
        param: its place in the request.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    nodes = list(_walk(schema, param))
    multiples: set[int] = set()
    for place, node in nodes:
        if isinstance(node, Mapping):
            _check_words(node, place)
            _check_values(node, place)
            _check_patterns(node, place)
            multiples |= _multiple(node, place)
    if math.prod(multiples) > MAX_MULTIPLE:
        raise InvalidRequestError(
            f"{param}: multipleOf of {sorted(multiples)} together are too much; their product may "
            f"be {MAX_MULTIPLE}.",
            param=param,
        )
    shortest = _Shortest(schema, nodes).chars()
    if shortest is None:
        raise InvalidRequestError(
            f"{param}: too many $refs lead back to schemas around them, through each other.",
            param=param,
        )
    if shortest > MAX_SHORTEST_CHARS:
        raise InvalidRequestError(
            f"{param}: even its shortest document has more than {MAX_SHORTEST_CHARS} characters, "
            "or no end. Lower minItems and minLength, and see that each $ref to a schema around "
            "it can be left out.",
            param=param,
        )


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


def _walk(schema: object, place: str) -> Iterator[Node]:
    pending = [(place, schema)]
    while pending:
        place, node = pending.pop()
        yield place, node
        pending += [(f"{place}.{name}", child) for name, child in children(node)]


def _check_words(node: Mapping[str, Any], place: str) -> None:
    for word, instead in _PASSED_OVER.items():
        if word in node and instead:
            raise InvalidRequestError(
                f"{place}.{word} is not supported: {instead}.", param=f"{place}.{word}"
            )
    for word in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(node.get(word), bool):
            raise InvalidRequestError(
                f"{place}.{word}={str(node[word]).lower()} is of an old draft: give the number.",
                param=f"{place}.{word}",
            )


def _check_values(node: Mapping[str, Any], place: str) -> None:
    """Refuse numbers that JSON readers do not agree on."""
    for word in ("const", "enum"):
        pending = [node.get(word)]
        while pending:
            value = pending.pop()
            if isinstance(value, float) and abs(value) >= 2**53:
                raise InvalidRequestError(
                    f"{place}.{word} has {value}, which is not exact: give an integer.",
                    param=f"{place}.{word}",
                )
            if isinstance(value, Mapping):
                pending += value.values()
            elif isinstance(value, list):
                pending += value


def _check_patterns(node: Mapping[str, Any], place: str) -> None:
    if isinstance(node.get("pattern"), str):
        check_expression(node["pattern"], f"{place}.pattern")
    if isinstance(node.get("patternProperties"), Mapping):
        for pattern in node["patternProperties"]:
            check_expression(str(pattern), f"{place}.patternProperties")


def check_expression(expression: str, param: str) -> None:
    """Refuse a regular expression, or a grammar, whose counted repetitions make it huge.

    Raises:
        InvalidRequestError: ``param`` is what was given.
    """
    totals, atom, at = [0.0], 0.0, 0
    while at < len(expression):
        counted = _COUNT.match(expression, at)
        if counted is not None:
            most = max(map(int, filter(None, counted.groups())))
            totals[-1] += atom * max(0, most - 1)
            at = counted.end()
            continue
        character = expression[at]
        at += 2 if character == "\\" else 1
        if character == "(":
            totals.append(0.0)
            atom = 0.0
        elif character == ")" and len(totals) > 1:
            atom = totals.pop()
            totals[-1] += atom
        else:
            atom = 1.0
            totals[-1] += atom
    if sum(totals) > MAX_EXPANDED:
        raise InvalidRequestError(
            f"{param} has more than {MAX_EXPANDED} characters when its counted repetitions are "
            "written out. Lower the counts.",
            param=param,
        )


def _multiple(node: Mapping[str, Any], place: str) -> set[int]:
    """What ``multipleOf`` of a schema counts for, if it has one."""
    value = node.get("multipleOf")
    if value is None:
        return set()
    try:
        number = Decimal(str(value)).normalize()
        digits = int("".join(map(str, number.as_tuple().digits)))
    except (InvalidOperation, ValueError):
        digits = 0
    if isinstance(value, bool) or digits == 0 or number <= 0:
        raise InvalidRequestError(
            f"{place}.multipleOf={shortened(value)} is not allowed: a number above 0.",
            param=f"{place}.multipleOf",
        )
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    return {digits * 10 ** min(max(exponent, 0), 9)}


class _Shortest:
    """How many characters a schema's shortest document has at least: a least fixed point.

    Every schema starts without a document, and gets one as soon as all that it needs have one.
    What is not understood counts as a single character: the compiler will have its say.
    """

    def __init__(self, schema: object, nodes: list[Node]) -> None:
        self._root = schema
        self._chars: dict[int, float] = {id(node): math.inf for _, node in nodes}
        self._nodes = self._leaves_first()

    def chars(self) -> float | None:
        """Exact where it is too many, else a bound. None: too many references lead back to schemas around them to tell."""
        for _ in range(MAX_ROUNDS):
            changed = False
            for node in self._nodes:
                chars = self._of(node)
                if chars < self._chars[id(node)]:
                    self._chars[id(node)], changed = chars, True
            if not changed or self._chars[id(self._root)] <= MAX_SHORTEST_CHARS:
                return self._chars[id(self._root)]
        return None

    def _leaves_first(self) -> list[Any]:
        """All schemas that the root needs, each after those that it needs, but for circles."""
        ordered: list[Any] = []
        seen = {id(self._root)}
        pending = [(self._root, self._needed(self._root))]
        while pending:
            node, needed = pending[-1]
            for other in needed:
                if id(other) in self._chars and id(other) not in seen:
                    seen.add(id(other))
                    pending.append((other, self._needed(other)))
                    break
            else:
                ordered.append(node)
                pending.pop()
        return ordered

    def _needed(self, node: object) -> Iterator[Any]:
        for _, child in children(node):
            yield child
        if isinstance(node, Mapping) and isinstance(node.get("$ref"), str):
            yield self._target(node["$ref"])

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
            bounds.append(self._known(self._target(node["$ref"])))
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
            fields = [3.0 + len(str(key)) + self._known(known.get(key, True)) for key in names]
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

    def _target(self, reference: str) -> Any:
        """The schema that is meant; None: no part of this document."""
        if reference == "#":
            return self._root
        if not reference.startswith("#/"):
            return None
        node: Any = self._root
        for part in reference[2:].split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                return None
        return node


def _count(node: Mapping[str, Any], word: str) -> float:
    value = node.get(word)
    return float(value) if isinstance(value, int) and 0 <= value < 1 << 53 else 0.0
