"""The client's event parser: right for any text and any way of cutting it into chunks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve_client._sse import ServerSentEvent, SSEDecoder


def decode(*chunks: bytes) -> list[ServerSentEvent]:
    decoder = SSEDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def data_of(*chunks: bytes) -> list[str]:
    return [event.data for event in decode(*chunks)]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_every_line_end_of_the_standard_is_a_line_end(end: str) -> None:
    stream = "data: a\n\ndata: b\n\n".replace("\n", end).encode()

    assert data_of(stream) == ["a", "b"]


def test_a_line_ended_by_a_carriage_return_does_not_wait_for_the_next_chunk() -> None:
    decoder = SSEDecoder()

    assert decoder.feed(b"data: a\r\r") == [ServerSentEvent("a")]
    assert decoder.feed(b"\ndata: b\r\n\r\n") == [ServerSentEvent("b")]


def test_data_lines_are_joined_and_lose_one_leading_space_only() -> None:
    assert data_of(b"data:  one\ndata:two\ndata\n\n") == [" one\ntwo\n"]


def test_comments_and_unknown_fields_make_no_event() -> None:
    assert data_of(b": keep-alive\n\nid: 7\nretry: 10\nfoo: bar\n\ndata: x\n\n") == ["x"]


def test_an_event_has_its_name_and_the_next_one_does_not_inherit_it() -> None:
    events = decode(b"event: error\ndata: a\n\ndata: b\n\n")

    assert [event.event for event in events] == ["error", "message"]


def test_an_event_without_its_empty_line_is_not_dispatched() -> None:
    assert data_of(b"data: whole\n\ndata: torn") == ["whole"]


def test_a_byte_order_mark_in_front_is_skipped_once() -> None:
    bom = "\ufeff".encode()

    assert data_of(bom + b"data: a\n\n") == ["a"]
    assert data_of(b"data: a\n\n" + bom + b"data: b\n\n") == ["a"]


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    assert data_of(b"data: \xff!\n\n") == ["\ufffd!"]


line = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)


@given(
    payloads=st.lists(st.lists(line, min_size=1, max_size=3).map("\n".join), max_size=6),
    ends=st.lists(st.sampled_from(["\n", "\r", "\r\n"]), min_size=1, max_size=5),
    comment=line,
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_what_was_encoded_comes_out_whatever_the_line_ends_and_the_chunks(
    payloads: list[str], ends: list[str], comment: str, cuts: list[int]
) -> None:
    lines = []
    for payload in payloads:
        lines += [f":{comment}", *(f"data: {part}" for part in payload.split("\n")), ""]
    stream = "".join(text + ends[i % len(ends)] for i, text in enumerate(lines))
    # An LF after a bare CR would read as one CRLF: keep the two line ends apart.
    expected = payloads if "\r" not in ends or "\n" not in ends else None
    encoded = stream.encode()
    bounds = sorted({0, len(encoded), *(cut % (len(encoded) + 1) for cut in cuts)})

    whole = data_of(encoded)
    chunked = data_of(*(encoded[a:b] for a, b in pairwise(bounds)))
    byte_by_byte = data_of(*(bytes([byte]) for byte in encoded))

    assert whole == chunked == byte_by_byte
    if expected is not None:
        assert whole == expected
