"""What a range holds, and that its JSON schema says the same."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sortserve.core.ranges import Range, integers, numbers


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (integers(0, 20), [0, 20], [-1, 21, 0.0, 1.5, True, None, "1", 10**400]),
        (numbers(-2, 2), [-2, 2.0, 0], [-2.1, 3, math.nan, math.inf, False, "0", 10**400]),
        (
            Range(least=0, most=1, without_least=True, allowed=""),
            [5e-324, 1],
            [0, 0.0, -1, 1.1, math.nan, 10**400],
        ),
        (Range(least=1, is_integer=True, allowed=""), [1, 10**400], [0, -(10**400), 1.0]),
    ],
)
def test_a_range_holds_its_numbers_and_nothing_else(
    range_: Range, inside: list[Any], outside: list[Any]
) -> None:
    assert [value for value in inside if value not in range_] == []
    assert [value for value in outside if value in range_] == []


@pytest.mark.parametrize(
    ("range_", "schema"),
    [
        (integers(1, 5), {"type": "integer", "minimum": 1, "maximum": 5}),
        (
            Range(least=0, most=1, without_least=True, allowed=""),
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        ),
        (Range(least=1, is_integer=True, allowed=""), {"type": "integer", "minimum": 1}),
    ],
)
def test_the_schema_of_a_range_says_what_it_holds(range_: Range, schema: dict[str, Any]) -> None:
    assert range_.json_schema == schema
