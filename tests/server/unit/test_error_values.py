"""Values in the text of an error are written as the client wrote them."""

from __future__ import annotations

import pytest

from sortserve.core.errors import MAX_VALUE_CHARS, in_our_words, shortened


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (False, "false"),
        (None, "null"),
        (1, "1"),
        ("None", "'None'"),
        ([True, [None], "x"], "[true, [null], 'x']"),
        (("", "x"), "['', 'x']"),
        ({"a": {"b": False}}, "{'a': {'b': false}}"),
    ],
)
def test_the_words_of_json_are_written_as_in_json(value: object, text: str) -> None:
    assert shortened(value) == text


@pytest.mark.parametrize("value", ["x" * 10**6, [None] * 10**6, {str(i): True for i in range(999)}])
def test_a_long_value_is_cut(value: object) -> None:
    assert len(shortened(value)) <= MAX_VALUE_CHARS + 3


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Input should be a valid string", "it should be a valid string"),
        (
            "List should have at most 16 items after validation, not 200",
            "it should have at most 16 items",
        ),
        (
            "Dictionary should have at most 1 item after validation, not more",
            "it should have at most 1 item",
        ),
        ("String should have at most 256 characters", "it should have at most 256 characters"),
        ("Value error, it should be one of a, b", "it should be one of a, b"),
    ],
)
def test_what_pydantic_says_is_told_in_our_words(said: str, words: str) -> None:
    assert in_our_words(said) == words
