"""A body is counted before it is read: nothing large is built, and what is too much has a name."""

from __future__ import annotations

import json
import time
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.api.bodies.json_scan import _count_chars, check_size
from sortserve.api.bodies.limits import (
    MAX_FIELDS,
    MAX_KEY_CHARS,
    MAX_NUMBER_CHARS,
    MAX_OTHER_CHARS,
    MAX_OTHER_DEPTH,
    MAX_OTHER_VALUES,
    MAX_TOKEN_IDS,
    BodyLimits,
)
from sortserve.core.errors import InvalidRequestError

LIMITS = BodyLimits(max_model_len=8192, max_token_chars=81, max_sequences=128)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=10,
)


def refusal(body: bytes, **options: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_size(body, LIMITS, **options)
    return caught.value


def as_json(body: Any) -> bytes:
    return json.dumps(body).encode()


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=9).map("x".__add__), VALUES, max_size=4), st.booleans())
def test_a_small_object_passes_whatever_is_in_it(body: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(body, ensure_ascii=ascii_only)

    check_size(text.encode(errors="replace"), LIMITS)


@given(st.binary() | st.text(alphabet='[]{}",:\\ax0 ').map(str.encode))
def test_what_is_no_json_is_left_to_the_parser(text: bytes) -> None:
    check_size(b'{"x":' + text, LIMITS)


@pytest.mark.parametrize("text", [b"", b"[]", b" [{}]", b'"a"', b"null", b"\xef\xbb\xbf{}"])
def test_what_is_no_object_is_not_looked_at(text: bytes) -> None:
    assert refusal(text).code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({"prompt": "a", "x": "a" * (MAX_OTHER_CHARS + 1)}, "x", id="a string"),
        pytest.param({"x": [0, {"y": "a" * (MAX_OTHER_CHARS + 1)}]}, "x.1.y", id="its path"),
        pytest.param({"x": ["a"] * MAX_OTHER_VALUES}, "x", id="strings"),
        pytest.param({"x": [[]] * MAX_OTHER_VALUES}, "x", id="lists"),
        pytest.param({"x": {str(i): 0 for i in range(MAX_OTHER_VALUES)}}, "x", id="names"),
        pytest.param({"x": [0] * 9000}, "x", id="numbers"),
        pytest.param({"x": ["a" * 40_000, "a" * 40_000]}, "x", id="characters together"),
        pytest.param({"x": "a" * 40_000, "y": "a" * 40_000}, "y", id="fields share a limit"),
        pytest.param({f"x{i}": 0 for i in range(MAX_FIELDS + 1)}, f"x{MAX_FIELDS}", id="fields"),
        pytest.param({"prompt": [0] * (MAX_TOKEN_IDS + 1)}, "prompt", id="token ids"),
        pytest.param({"prompt": [[0] * 9] * 5000}, "prompt", id="lists of token ids"),
        pytest.param({"prompt": [[[0]]]}, "prompt", id="depth of a prompt"),
        pytest.param({"messages": [{}] * 65_536}, "messages", id="empty messages"),
        pytest.param({"messages": [{"role": "u" * 2_000_000}]}, "messages.0.role", id="a role"),
        pytest.param({"tokens": [0] * 16_385}, "tokens", id="tokens"),
    ],
)
def test_what_is_too_much_is_refused_by_the_name_of_its_field(body: Any, param: str) -> None:
    assert refusal(as_json(body)).param == param


def test_a_name_is_bounded_at_any_depth() -> None:
    name = "k" * (MAX_KEY_CHARS + 1)

    assert refusal(as_json({name: 0})).param == name[:-1]
    assert refusal(as_json({"x": [{name: 0}]})).param == f"x.0.{name[:-1]}"


def test_depth_is_bounded_before_the_end_is_seen() -> None:
    deepest = b"[" * MAX_OTHER_DEPTH

    check_size(b'{"x":' + deepest, LIMITS)

    assert refusal(b'{"x":' + deepest + b"[").param == "x"


@pytest.mark.parametrize("number", ["9", "0.", "-", "1e"])
def test_a_number_is_bounded_by_its_characters_and_white_space_is_none(number: str) -> None:
    digits = number + "9" * (MAX_NUMBER_CHARS - len(number))
    space = " " * 10_000

    check_size(f'{{"x": [{space}{digits}{space}, {digits}]}}'.encode(), LIMITS)

    assert refusal(f'{{"x": [0, {digits}9]}}'.encode()).param == "x.1"


@pytest.mark.parametrize("num_before", [60_000, 61_000, 65_530, 65_536, 131_072])
def test_a_long_number_is_seen_wherever_it_is(num_before: int) -> None:
    before = b'{"x": [' + b" " * num_before
    number = b"9" * MAX_NUMBER_CHARS

    check_size(before + number + b"]}", LIMITS)

    assert refusal(before + number + b"9]}").param == "x.0"
    assert refusal(before + b"1, " + number + b"9]}").param == "x.1"


def test_many_numbers_just_short_enough_are_looked_at_once() -> None:
    numbers = b" ".join([b"9" * MAX_NUMBER_CHARS] * 900)
    before = time.thread_time()

    check_size(b'{"x":' + numbers + b"}", LIMITS)  # no JSON, but that is not known yet

    assert time.thread_time() - before < 1  # 30 ms, or ten seconds if each were a new start


@pytest.mark.parametrize("rest", [b":", b"}", b"]", b":1", b"1:", b":,", b"} "], ids=repr)
def test_what_is_no_json_is_not_looked_at_byte_by_byte(rest: bytes) -> None:
    text = b'{"x":1' + rest * (4_000_000 // len(rest))
    before = time.thread_time()

    with suppress(InvalidRequestError):
        check_size(text, LIMITS)

    assert time.thread_time() - before < 1  # 60 ms, or three seconds of a step for each byte


def test_a_field_that_comes_twice_counts_twice() -> None:
    text = b'{"x":["a"],' + b",".join([b'"y":' + as_json(["a"] * 1000)] * 5) + b"}"

    assert refusal(text).param == "y"


def test_escapes_hide_no_field() -> None:
    assert refusal(b'{"\\u0074okens": [' + b"0," * 16_385 + b"0]}").param == "tokens"


def test_of_unknown_fields_the_first_is_refused_where_none_is_allowed() -> None:
    body = as_json({"prompt": "a", "max_token": 1, "x": 2})

    error = refusal(body, known_fields={"prompt": None, "max_tokens": None})

    assert error.param == "max_token"
    assert "did you mean max_tokens?" in error.message


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(1, 30))
def test_no_string_counts_for_more_than_its_characters(text: str, times: int) -> None:
    for raw in (json.dumps(text * times), json.dumps(text * times, ensure_ascii=False)):
        inside = raw[1:-1].encode()

        assert _count_chars(inside, 0, len(inside), 10**9) <= len(text * times)


@pytest.mark.parametrize("unit", ["a", "é", "龘", "😀"])
def test_a_string_without_escapes_counts_for_its_characters_exactly(unit: str) -> None:
    raw = (unit * 100_000).encode()

    assert _count_chars(raw, 0, len(raw), 10**9) == 100_000


@pytest.mark.parametrize(
    "unit",
    [b"[],", b"0,", b'"a",', b'{"a":0},', b"[", b'"', b"\\", b" ", b'"\\n\\"\\u00e9",'],
    ids=repr,
)
def test_scanning_takes_no_memory_to_speak_of(unit: bytes) -> None:
    text = b'{"x":[' + unit * (1_000_000 // len(unit))

    tracemalloc.start()
    try:
        check_size(text, LIMITS)
    except InvalidRequestError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert peak < 200_000
