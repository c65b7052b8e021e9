"""What is looked at in a JSON schema before it is compiled (no library).

Words of older drafts, or of other dialects, that bound a document and that the compiler would pass
over are refused by name, with their place. So is what would take it long, and a schema whose
shortest document is out of all proportion, or has no end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from sortserve.core.errors import InvalidRequestError, shortened
from sortserve.text.merges import check_merges
from sortserve.text.schema_nodes import needed_first, walk
from sortserve.text.schema_rewrites import rewrite
from sortserve.text.shortest import MAX_SHORTEST_CHARS, Shortest

__all__ = ["check_expression", "check_schema"]

MAX_MULTIPLE = 10_000
"""Product of all ``multipleOf``, without their decimal points: their compiler counts remainders."""

MAX_EXPANDED = 20_000
"""Characters of a regular expression with its counted repetitions written out."""

_PASSED_OVER = {
    "divisibleBy": "use multipleOf",
    "extends": "use allOf",
    "disallow": "leave it out",
    "discriminator": "",  # an annotation of OpenAPI
    "x-guidance": "the server sets it",
}

_DRAFT = re.compile(r"https?://json-schema\.org/draft")
_COUNT = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")


def check_schema(schema: object, param: str) -> None:
    """Refuse what the compiler would pass over, or take too long for, and rewrite what it must not.

    Args:
        schema: parsed; it is changed in place (``schema_rewrites``).
        param: its place in the request.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    if isinstance(schema, bool):
        raise InvalidRequestError(
            f"{param}={str(schema).lower()} is not supported: give an object.", param=param
        )
    nodes = list(walk(schema, param))
    multiples: set[int] = set()
    for place, node in nodes:
        if isinstance(node, Mapping):
            _check_words(node, place)
            _check_reference(node, place, is_root=node is schema)
            _check_values(node, place)
            _check_patterns(node, place)
            multiples |= _multiple(node, place)
    if math.prod(multiples) > MAX_MULTIPLE:
        raise InvalidRequestError(
            f"{param}: multipleOf of {sorted(multiples)} together are too much; their product may "
            f"be {MAX_MULTIPLE}.",
            param=param,
        )
    rewrite(nodes)
    nodes = list(walk(schema, param))  # there may be more now
    ordered = needed_first(schema, nodes)
    check_merges(schema, nodes, ordered)
    shortest = Shortest(schema, ordered).chars()
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


def _check_words(node: Mapping[str, Any], place: str) -> None:
    for word, instead in _PASSED_OVER.items():
        if word in node and instead:
            raise InvalidRequestError(
                f"{place}.{word} is not supported: {instead}.", param=f"{place}.{word}"
            )
    draft = node.get("$schema")
    if draft is not None and not (isinstance(draft, str) and _DRAFT.match(draft)):
        raise InvalidRequestError(
            f"{place}.$schema={shortened(draft)} is not supported: name a draft of "
            "json-schema.org, or leave it out.",
            param=f"{place}.$schema",
        )
    for word in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(node.get(word), bool):
            raise InvalidRequestError(
                f"{place}.{word}={str(node[word]).lower()} is of an old draft: give the number.",
                param=f"{place}.{word}",
            )


def _check_reference(node: Mapping[str, Any], place: str, *, is_root: bool) -> None:
    """Refuse references that could lead to what has not been looked at."""
    reference = node.get("$ref")
    if isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
        raise InvalidRequestError(
            f"{place}.$ref={shortened(reference)} is not supported: it must be # or begin with #/.",
            param=f"{place}.$ref",
        )
    if "$id" in node and not is_root:
        raise InvalidRequestError(
            f"{place}.$id is not supported below the root.", param=f"{place}.$id"
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
