from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.errors import InvalidRequestError
from sortserve.model.tokenizer import TextStream, Tokenizer
from sortserve.sampling_params import SamplingParams
from support.byte_tokenizer import make_byte_tokenizer, make_metaspace_tokenizer

END_OF_TEXT, IM_START, IM_END = 0, 1, 2
BOS, EOS = 1, 2

EMOJI_AND_CJK = "héllo 你好 😀👩‍👩‍👧 naïve"
texts = st.text(alphabet="ab é你好😀 \n\ufffdthe", max_size=30)


@cache
def byte_tokenizer() -> Tokenizer:
    return Tokenizer(make_byte_tokenizer(), frozenset({IM_END}))


@cache
def metaspace_tokenizer() -> Tokenizer:
    return Tokenizer(make_metaspace_tokenizer(), frozenset({EOS}))


@cache
def bare_metaspace_tokenizer() -> Tokenizer:
    """The same vocabulary with the Metaspace decoder of newer conversions."""
    from tokenizers import decoders

    hf_tokenizer = make_metaspace_tokenizer()
    hf_tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    return Tokenizer(hf_tokenizer, frozenset({EOS}))


def stream_of(
    tokenizer: Tokenizer, *, prompt: Sequence[int] = (5,), **params: object
) -> TextStream:
    return TextStream(tokenizer, SamplingParams(max_tokens=10_000, **params), prompt)  # type: ignore[arg-type]


def run(stream: TextStream, token_ids: Sequence[int]) -> tuple[list[str], bool]:
    """All deltas, ``finish`` the last of them, and whether a stop string came."""
    deltas = []
    for token_id in token_ids:
        delta, stopped = stream.push(token_id)
        deltas.append(delta)
        if stopped:
            assert stream.finish() == ""
            return deltas, True
    return [*deltas, stream.finish()], False


def byte_ids(data: bytes) -> list[int]:
    """One token for each byte."""
    return [3 + byte for byte in data]


def cut_by_hand(text: str, stops: Sequence[str], *, keep: bool) -> tuple[str, bool]:
    """Grow the text by a character at a time until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end if keep else end - max(map(len, complete))], True
    return text, False


# ---- the text of a stream ---------------------------------------------------------------------


@given(st.binary(max_size=40))
def test_any_bytes_one_token_each_come_out_as_the_whole_decodes(data: bytes) -> None:
    deltas, _ = run(stream_of(byte_tokenizer()), byte_ids(data))
    assert "".join(deltas) == data.decode(errors="replace")
    assert "".join(deltas) == byte_tokenizer().decode(byte_ids(data))


@given(st.lists(st.integers(0, 286), max_size=40), st.booleans())
def test_any_tokens_come_out_as_transformers_decodes_them(ids: list[int], skip: bool) -> None:
    deltas, _ = run(stream_of(byte_tokenizer(), skip_special_tokens=skip), ids)
    assert "".join(deltas) == make_byte_tokenizer_once().decode(ids, skip_special_tokens=skip)


@cache
def make_byte_tokenizer_once():  # type: ignore[no-untyped-def]
    return make_byte_tokenizer()


@given(texts)
def test_valid_text_never_shows_a_replacement_character(text: str) -> None:
    text = text.replace("\ufffd", "")
    for ids in (byte_ids(text.encode()), byte_tokenizer().encode(text)):
        deltas, _ = run(stream_of(byte_tokenizer()), ids)
        assert "".join(deltas) == text
        assert not any("\ufffd" in delta for delta in deltas)


def test_a_character_comes_out_with_its_last_byte() -> None:
    deltas, _ = run(stream_of(byte_tokenizer()), byte_ids("a😀b".encode()))
    assert deltas == ["a", "", "", "", "😀", "b", ""]


def test_a_real_replacement_character_is_text_like_any_other() -> None:
    deltas, _ = run(stream_of(byte_tokenizer()), byte_ids("\ufffd".encode()))
    assert deltas == ["", "", "\ufffd", ""]


def test_an_invalid_byte_comes_out_as_soon_as_it_cannot_become_a_character() -> None:
    deltas, _ = run(stream_of(byte_tokenizer()), byte_ids(b"\xffa\xf0\x9fb"))
    assert deltas == ["\ufffd", "a", "", "", "\ufffdb", ""]


def test_half_a_character_at_the_end_comes_out_when_the_stream_finishes() -> None:
    deltas, _ = run(stream_of(byte_tokenizer()), byte_ids(b"a\xe4\xbd"))
    assert deltas == ["a", "", "", "\ufffd"]


def test_special_tokens_are_hidden_or_shown_as_asked() -> None:
    ids = byte_tokenizer().encode("a<|im_start|>b")
    assert "".join(run(stream_of(byte_tokenizer()), ids)[0]) == "ab"
    shown = stream_of(byte_tokenizer(), skip_special_tokens=False)
    assert "".join(run(shown, ids)[0]) == "a<|im_start|>b"


def test_an_id_beyond_the_vocabulary_has_no_text() -> None:
    deltas, _ = run(stream_of(byte_tokenizer()), [*byte_ids(b"a"), 5000, *byte_ids(b"b")])
    assert "".join(deltas) == "ab"
    assert byte_tokenizer().decode([*byte_ids(b"a"), 5000, -1]) == "a"


# ---- sentencepiece style ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [metaspace_tokenizer, bare_metaspace_tokenizer])
@given(prompt=st.sampled_from(["", "hello", "the "]), text=st.text("abé .th", max_size=20))
def test_sentencepiece_output_is_what_it_adds_to_the_prompts_text(
    make: type[Tokenizer], prompt: str, text: str
) -> None:
    tokenizer = make()  # type: ignore[call-arg]
    prompt_ids = [BOS, *(tokenizer.encode(prompt) if prompt else ())]
    ids = tokenizer.encode(text)
    deltas, _ = run(stream_of(tokenizer, prompt=prompt_ids), ids)
    whole = tokenizer.decode([*prompt_ids, *ids])
    assert tokenizer.decode(prompt_ids) + "".join(deltas) == whole


def test_the_space_before_a_sentencepiece_word_is_kept_after_a_prompt_only() -> None:
    ids = metaspace_tokenizer().encode("hello world")
    after_prompt = run(stream_of(metaspace_tokenizer(), prompt=[BOS, ids[0]]), ids)[0]
    after_nothing = run(stream_of(metaspace_tokenizer(), prompt=[BOS]), ids)[0]
    assert "".join(after_prompt) == " hello world"
    assert "".join(after_nothing) == "hello world"


@given(st.text("你好😀é", max_size=12))
def test_byte_fallback_never_shows_half_a_character(text: str) -> None:
    ids = metaspace_tokenizer().encode("a" + text)
    deltas, _ = run(stream_of(metaspace_tokenizer()), ids)
    assert "".join(deltas) == " a" + text


def test_byte_fallback_shows_each_character_at_once() -> None:
    ids = metaspace_tokenizer().encode("你好")[1:]  # without the leading space
    deltas, _ = run(stream_of(metaspace_tokenizer()), ids)
    assert deltas == ["", "", "你", "", "", "好", ""]


# ---- stop strings -----------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    text=st.text("ab😀", max_size=25),
    stops=st.lists(st.text("ab😀", min_size=1, max_size=5), max_size=4),
    keep=st.booleans(),
    one_token_a_byte=st.booleans(),
)
def test_text_is_cut_exactly_where_the_first_stop_string_is_complete(
    text: str, stops: list[str], keep: bool, one_token_a_byte: bool
) -> None:
    ids = byte_ids(text.encode()) if one_token_a_byte else byte_tokenizer().encode(text)
    stream = stream_of(byte_tokenizer(), stop=tuple(stops), include_stop_str_in_output=keep)
    deltas, stopped = run(stream, ids)
    expected = cut_by_hand(text, stops, keep=keep)
    assert ("".join(deltas), stopped) == expected
    shown = ""
    for delta in deltas:  # nothing is ever shown that the cut takes back
        shown += delta
        assert expected[0].startswith(shown)


@given(text=st.text("aab", max_size=20), stop=st.text("aab", min_size=1, max_size=6))
def test_text_waits_only_while_it_could_still_become_a_stop_string(text: str, stop: str) -> None:
    stream = stream_of(byte_tokenizer(), stop=(stop,))
    shown = ""
    for end, token_id in enumerate(byte_ids(text.encode()), start=1):
        delta, stopped = stream.push(token_id)
        if stopped:
            return
        shown += delta
        held = text[len(shown) : end]
        assert stop.startswith(held)
        assert not any(stop.startswith(text[start:end]) for start in range(len(shown)))


def test_a_stop_string_is_found_in_the_middle_of_a_token() -> None:
    ids = byte_tokenizer().encode("a world")
    deltas, stopped = run(stream_of(byte_tokenizer(), stop=("or",)), ids)
    assert ("".join(deltas), stopped) == ("a w", True)


def test_of_stop_strings_that_end_together_the_longest_is_cut() -> None:
    deltas, _ = run(stream_of(byte_tokenizer(), stop=("c", "abc")), byte_ids(b"xabc"))
    assert "".join(deltas) == "x"


def test_a_stop_string_that_overlaps_a_false_start_is_found() -> None:
    stream = stream_of(byte_tokenizer(), stop=("aabaaac",))
    deltas, stopped = run(stream, byte_ids(b"aabaaabaaac"))
    assert ("".join(deltas), stopped) == ("aaba", True)


def test_a_stop_string_before_min_tokens_is_passed_over() -> None:
    stream = stream_of(byte_tokenizer(), stop=("ab",), min_tokens=4)
    deltas, stopped = run(stream, byte_ids(b"ab-ab"))
    assert ("".join(deltas), stopped) == ("ab-", True)


def test_a_stop_string_of_replacement_characters_is_found_at_the_end() -> None:
    stream = stream_of(byte_tokenizer(), stop=("\ufffd",))
    assert stream.push(byte_ids(b"a")[0]) == ("a", False)
    assert stream.push(byte_ids(b"\xf0")[0]) == ("", False)
    assert stream.finish() == ""


# ---- one token --------------------------------------------------------------------------------


def test_the_bytes_of_half_a_character_are_exact() -> None:
    token_id = make_byte_tokenizer_once().convert_tokens_to_ids("ðŁ")
    assert byte_tokenizer().convert_id_to_token_text(token_id) == ("\ufffd", b"\xf0\x9f")
    fallback = make_metaspace_tokenizer().convert_tokens_to_ids("<0xF0>")
    assert metaspace_tokenizer().convert_id_to_token_text(fallback) == ("\ufffd", b"\xf0")


@pytest.mark.parametrize("make", [byte_tokenizer, metaspace_tokenizer])
def test_the_bytes_of_all_tokens_make_the_text(make: type[Tokenizer]) -> None:
    tokenizer = make()  # type: ignore[call-arg]
    ids = tokenizer.encode(EMOJI_AND_CJK)
    data = b"".join(tokenizer.convert_id_to_token_text(token_id)[1] for token_id in ids)
    assert data.decode().removeprefix(" ") == EMOJI_AND_CJK


def test_special_tokens_are_written_out_in_logprobs() -> None:
    assert byte_tokenizer().convert_id_to_token_text(IM_END) == ("<|im_end|>", b"<|im_end|>")


# ---- encode and chat --------------------------------------------------------------------------


@given(texts)
def test_encode_and_decode_are_inverse(text: str) -> None:
    assert byte_tokenizer().decode(byte_tokenizer().encode(text)) == text


def test_half_a_surrogate_pair_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode: character 1") as caught:
        byte_tokenizer().encode("a\ud83d")
    assert caught.value.param == "prompt"


def test_encode_pays_no_heed_to_truncation_and_padding_of_the_tokenizer_it_was_given() -> None:
    hf_tokenizer = make_byte_tokenizer()
    hf_tokenizer.backend_tokenizer.enable_truncation(2)
    hf_tokenizer.backend_tokenizer.enable_padding(length=50)
    assert len(Tokenizer(hf_tokenizer, frozenset()).encode("xyzxyz")) == 6


def test_messages_go_through_the_chat_template() -> None:
    ids = byte_tokenizer().apply_chat_template([{"role": "user", "content": "hi"}])
    text = byte_tokenizer().decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(IM_START) == 2


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        pytest.param([{"role": "wizard", "content": "x"}], "unknown role wizard", id="role"),
        pytest.param([{"role": "user", "content": ["x"]}], "does not take", id="content-type"),
        pytest.param([{"role": "user"}], "does not take", id="no-content"),
        pytest.param([], "at least one message", id="no-messages"),
    ],
)
def test_messages_that_the_template_refuses_are_the_clients_error(
    messages: list[dict[str, object]], told: str
) -> None:
    with pytest.raises(InvalidRequestError, match=told) as caught:
        byte_tokenizer().apply_chat_template(messages)
    assert caught.value.param == "messages"


def test_a_request_cannot_bring_its_own_template() -> None:
    with pytest.raises(InvalidRequestError, match=r"chat_template_kwargs\.chat_template"):
        byte_tokenizer().apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template="{{ 1 }}"
        )


def test_without_a_chat_template_messages_are_refused_and_a_prompt_is_suggested() -> None:
    assert byte_tokenizer().has_chat_template
    assert not metaspace_tokenizer().has_chat_template
    with pytest.raises(InvalidRequestError, match="Send a prompt") as caught:
        metaspace_tokenizer().apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"
