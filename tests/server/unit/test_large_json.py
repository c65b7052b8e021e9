"""Large replies are the same JSON as small ones, written in pieces and on a thread."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.api.replies.large_json import THREAD_FROM_VALUES, json_pieces, json_reply
from sortserve.api.text_threads import TextThreads

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)


@settings(max_examples=30, deadline=None)
@given(VALUES, st.integers(1, 400))
def test_pieces_together_are_the_json_of_the_value(value: Any, times: int) -> None:
    value = {"a": value, "b": [value] * times, "c": {str(i): value for i in range(times % 50)}}

    assert json.loads("".join(json_pieces(value))) == value


def test_an_iterator_is_written_as_a_list() -> None:
    value = {"choices": iter([{"index": 0}, {"index": 1}]), "none": iter([])}

    assert "".join(json_pieces(value)) == '{"choices":[{"index":0},{"index":1}],"none":[]}'


def test_no_piece_is_large() -> None:
    entry = {"token": "a", "top_logprobs": [{"token": "b"}] * 20}
    value = {"choices": [{"logprobs": {"content": [entry] * 10_000}}]}

    assert max(map(len, json_pieces(value["choices"][0]))) < 200_000


@pytest.mark.parametrize("size", [0, THREAD_FROM_VALUES - 1, THREAD_FROM_VALUES, 5000])
async def test_what_is_large_is_made_on_a_thread(size: int) -> None:
    made_on = []

    def make() -> dict[str, Any]:
        made_on.append(threading.current_thread() is threading.main_thread())
        return {"tokens": list(range(size)), "text": "é"}

    reply = await json_reply(make, size, TextThreads())

    assert made_on == [size < THREAD_FROM_VALUES]
    assert json.loads(bytes(reply.body)) == {"tokens": list(range(size)), "text": "é"}
    assert reply.headers["content-type"] == "application/json"
