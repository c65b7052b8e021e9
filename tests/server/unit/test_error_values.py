"""Values in the text of an error are written as the client wrote them."""

from __future__ import annotations

import pytest

from sortserve.core.errors import MAX_VALUE_CHARS, shortened


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (False, "false"),
        (None, "null"),
        (1, "1"),
        ("None", "'None'"),
        ([True, [None], "x"], "[true, [null], 'x']"),
        ({"a": {"b": False}}, "{'a': {'b': false}}"),
    ],
)
def test_the_words_of_json_are_written_as_in_json(value: object, text: str) -> None:
    assert shortened(value) == text


@pytest.mark.parametrize("value", ["x" * 10**6, [None] * 10**6, {str(i): True for i in range(999)}])
def test_a_long_value_is_cut(value: object) -> None:
    assert len(shortened(value)) <= MAX_VALUE_CHARS + 3
