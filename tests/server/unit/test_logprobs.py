from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.api.interfaces import Tokenizer
from sortserve.api.replies.logprobs import CompletionLogprobs, token_entries
from sortserve.core.sampling_params import SampledToken, TokenLogprob


class TableTokenizer:
    """Tokens are the bytes of a table."""

    def __init__(self, table: Mapping[int, bytes]) -> None:
        self._table = table

    def convert_id_to_token_text(self, token_id: int) -> tuple[str, bytes]:
        data = self._table.get(token_id, b"")
        return data.decode(errors="replace"), data


def sampled(token_id: int, logprob: float, *rivals: tuple[int, float]) -> SampledToken:
    tops = tuple(TokenLogprob(token_id=i, logprob=value) for i, value in rivals)
    return SampledToken(token_id=token_id, logprob=logprob, top_logprobs=tops)


def top_of(table: Mapping[int, bytes], *tokens: SampledToken) -> list[dict[str, float]]:
    logprobs = CompletionLogprobs(cast(Tokenizer, TableTokenizer(table)))
    return cast(list[dict[str, float]], logprobs.next(tokens)["top_logprobs"])


def test_rivals_of_one_text_are_all_kept_the_likeliest_under_the_text_others_under_bytes() -> None:
    table = {1: b"\xf0", 2: b"\xf0\x9f", 3: b"\xe4\xbd"}
    token = sampled(2, -0.5, (2, -0.5), (1, -1.5), (3, -2.5))

    assert top_of(table, token) == [
        {"\ufffd": -0.5, "bytes:\\xf0": -1.5, "bytes:\\xe4\\xbd": -2.5},
    ]


def test_a_sampled_token_does_not_displace_a_likelier_one_of_its_text() -> None:
    table = {1: b"\xf0", 2: b"\xe4"}
    assert top_of(table, sampled(2, -3.0, (1, -0.1))) == [{"\ufffd": -0.1, "bytes:\\xe4": -3.0}]


def test_of_equally_likely_tokens_the_sampled_one_has_the_plain_text() -> None:
    table = {1: b"\xf0", 2: b"\xe4"}
    token = sampled(2, -1.0, (1, -1.0), (2, -1.0))
    assert top_of(table, token) == [{"\ufffd": -1.0, "bytes:\\xf0": -1.0}]


def test_tokens_of_the_same_bytes_are_told_apart_by_their_ids_at_last() -> None:
    table = {1: b"a", 2: b"a", 3: b"a", 4: b"b"}
    token = sampled(4, -0.1, (4, -0.1), (3, -1.0), (1, -2.0), (2, -3.0))
    expected = {"b": -0.1, "a": -1.0, "bytes:\\x61": -2.0, "token_id:2": -3.0}
    assert top_of(table, token) == [expected]


def test_rows_of_a_padded_vocabulary_have_no_text_and_are_kept_all_the_same() -> None:
    token = sampled(7, -0.1, (7, -0.1), (8, -1.0), (9, -2.0))
    assert top_of({}, token) == [{"": -0.1, "bytes:": -1.0, "token_id:9": -2.0}]


def test_a_token_that_is_written_like_anothers_bytes_displaces_nobody() -> None:
    table = {1: b"\xf0", 2: b"\xe4", 3: b"bytes:\\xe4"}
    token = sampled(1, -0.1, (1, -0.1), (2, -1.0), (3, -2.0))
    assert top_of(table, token) == [
        {"\ufffd": -0.1, "token_id:2": -1.0, "bytes:\\xe4": -2.0},
    ]


def test_the_sampled_token_is_one_entry_whether_it_is_among_the_rivals_or_not() -> None:
    table = {1: b"a", 2: b"b"}
    among, beyond = sampled(1, -0.1, (1, -0.1), (2, -3.0)), sampled(1, -4.0, (2, -0.1))
    assert top_of(table, among, beyond) == [{"a": -0.1, "b": -3.0}, {"b": -0.1, "a": -4.0}]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"", b"a", b"\xf0", b"\xf0\x9f", b"bytes:\\xf0", b"\xe4"]),
            st.floats(-9, 0),
        ),
        min_size=1,
        max_size=20,
    ),
    st.data(),
)
def test_no_rival_is_ever_lost_and_every_text_has_its_likeliest(
    rows: Sequence[tuple[bytes, float]], data: st.DataObject
) -> None:
    table = dict(enumerate(text for text, _ in rows))
    values = dict(enumerate(value for _, value in rows))
    chosen = data.draw(st.sampled_from(sorted(table)))
    rivals = data.draw(st.permutations(sorted(table)))

    [top] = top_of(table, sampled(chosen, values[chosen], *((i, values[i]) for i in rivals)))

    assert sorted(top.values()) == sorted(values.values())
    for text in {data.decode(errors="replace") for data in table.values()}:
        same = [values[i] for i, raw in table.items() if raw.decode(errors="replace") == text]
        assert top[text] == max(same)


def test_chat_entries_of_one_text_stay_apart_and_say_their_bytes() -> None:
    tokenizer = cast(Tokenizer, TableTokenizer({1: b"\xf0", 2: b"\xe4"}))
    [entry] = token_entries(tokenizer, [sampled(1, -0.5, (1, -0.5), (2, -1.5))])
    expected: list[dict[str, Any]] = [
        {"token": "\ufffd", "logprob": -0.5, "bytes": [0xF0]},
        {"token": "\ufffd", "logprob": -1.5, "bytes": [0xE4]},
    ]
    assert entry["top_logprobs"] == expected


@pytest.mark.parametrize("value", [float("-inf"), -9999.5])
def test_what_json_cannot_say_is_the_lowest_number(value: float) -> None:
    assert top_of({1: b"a"}, sampled(1, value)) == [{"a": -9999.0}]
