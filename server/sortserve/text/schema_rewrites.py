"""What a JSON schema says in words that the compiler does not take, or takes too loosely.

The same is said in others, so that schemas as pydantic and zod write them work, and each date is
one that exists. A document that fits the rewritten schema fits the client's.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from sortserve.text.schema_nodes import Node

__all__ = ["rewrite"]

_COUNTS = (
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("minContains", "maxContains"),
)
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = f"(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
_HOUR = "(?:[01][0-9]|2[0-3])"
_TIME = f"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{{1,9}})?(?:[Zz]|[+-]{_HOUR}:[0-5][0-9])"
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}
"""RFC 3339 without leap seconds and the year 0: few readers take those."""


def rewrite(nodes: Iterable[Node]) -> None:
    """Say in place what the compiler takes."""
    for _, node in nodes:
        if isinstance(node, MutableMapping):
            _rewrite_counts(node)
            _rewrite_format(node)
            if node.get("uniqueItems") is False:
                del node["uniqueItems"]


def _rewrite_counts(node: MutableMapping[str, Any]) -> None:
    """A count may be written ``4.0``."""
    for word in _COUNTS:
        value = node.get(word)
        if isinstance(value, float) and value.is_integer():
            node[word] = int(value)


def _rewrite_format(node: MutableMapping[str, Any]) -> None:
    name = node.get("format")
    pattern = _FORMATS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return
    del node["format"]
    if "pattern" not in node:
        node["pattern"] = pattern
    elif isinstance(node.get("allOf", []), list):
        node["allOf"] = [*node.get("allOf", []), {"pattern": pattern}]
    else:
        node["format"] = name  # the compiler will say what is wrong with allOf
