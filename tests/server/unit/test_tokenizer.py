from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as BackendTokenizer
from transformers import PreTrainedTokenizerFast

from sortserve.core.errors import InvalidRequestError
from sortserve.core.sampling_params import SamplingParams
from sortserve.text.stop_strings import StopMatcher
from sortserve.text.tokenizer import TextStream, Tokenizer
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


def test_a_text_with_a_token_that_the_model_has_no_embedding_for_is_refused_by_name() -> None:
    hf_tokenizer = make_byte_tokenizer()
    num_known = len(hf_tokenizer)
    hf_tokenizer.add_tokens(["<late>", "<later>"])
    hf_tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer = Tokenizer(hf_tokenizer, frozenset({IM_END}), model_vocab_size=num_known + 1)

    assert tokenizer.vocab_size == num_known + 1
    assert tokenizer.encode("a<late>")[-1] == num_known
    message = f"the token '<later>', whose id {num_known + 1} is beyond .* 0 to {num_known}"
    with pytest.raises(InvalidRequestError, match=f"prompt holds {message}") as caught:
        tokenizer.encode("a<later>b")
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match=f"messages holds {message}") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "a<later>b"}])
    assert caught.value.param == "messages"


def test_a_model_may_know_more_tokens_than_the_tokenizer() -> None:
    """Its vocabulary is padded: such ids can be generated, and have no text."""
    hf_tokenizer = make_byte_tokenizer()
    tokenizer = Tokenizer(hf_tokenizer, frozenset({IM_END}), model_vocab_size=10_000)

    assert tokenizer.vocab_size == len(hf_tokenizer)
    assert run(stream_of(tokenizer), [9_999, *tokenizer.encode("a"), 9_000]) == (
        ["", "a", "", ""],
        False,
    )


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


# ---- added tokens -----------------------------------------------------------------------------

ADDED = ("đem", "ñandú", "<đ>", "Ġq", " a b ", "<0x41>", "\u2581x", "你好", "tool", "😀")
"""Letters in the table of byte-level BPE or not, blanks, and what looks like other tokens."""
KINDS = ("byte-level", "sentencepiece", "metaspace", "without-byte-tokens")
all_kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def with_added_tokens(kind: str) -> Tokenizer:
    """A tokenizer of one kind with each of ADDED as a plain token and, in brackets, as special."""
    hf_tokenizer = make_byte_tokenizer() if kind == "byte-level" else make_metaspace_tokenizer()
    backend = hf_tokenizer.backend_tokenizer
    if kind == "metaspace":
        backend.decoder = decoders.Metaspace()
    if kind == "without-byte-tokens":
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    backend.add_special_tokens([AddedToken(f"[{text}]", normalized=False) for text in ADDED])
    return Tokenizer(hf_tokenizer, frozenset({EOS}))


def only_id(tokenizer: Tokenizer, text: str) -> int:
    [token_id] = tokenizer.encode(text, add_special_tokens=False)
    return token_id


def shown(
    tokenizer: Tokenizer, ids: Sequence[int], *, skip: bool, prompt: Sequence[int] = ()
) -> str:
    return "".join(run(stream_of(tokenizer, prompt=prompt, skip_special_tokens=skip), ids)[0])


@all_kinds
@pytest.mark.parametrize("text", [*ADDED, *(f"[{text}]" for text in ADDED)])
def test_the_text_of_an_added_token_is_its_content(kind: str, text: str) -> None:
    if (kind, text) == ("sentencepiece", "<0x41>"):
        pytest.skip("it is the model's own token for a byte")
    tokenizer = with_added_tokens(kind)
    token_id = only_id(tokenizer, text)
    assert tokenizer.convert_id_to_token_text(token_id) == (text, text.encode())
    assert tokenizer.decode([token_id], skip_special_tokens=False) == text
    for prompt in ((), tokenizer.encode("the")):
        assert shown(tokenizer, [token_id], skip=False, prompt=prompt) == text


@pytest.mark.parametrize("text", ["đ", "é", "Ġ", "ðŁ"])
def test_an_added_token_that_is_a_piece_of_a_byte_level_vocabulary_is_its_content_too(
    text: str,
) -> None:
    hf_tokenizer = make_byte_tokenizer()
    hf_tokenizer.backend_tokenizer.add_tokens([text])
    tokenizer = Tokenizer(hf_tokenizer, frozenset())
    assert tokenizer.decode(tokenizer.encode(f"x{text}y")) == f"x{text}y"


@pytest.mark.parametrize(("text", "meaning"), [("<0x41>", "A"), ("\u2581the", " the")])
def test_an_added_token_that_the_sentencepiece_model_writes_itself_means_what_it_means_there(
    text: str, meaning: str
) -> None:
    """Conversions list user-defined pieces as added tokens, runs of blanks among them."""
    hf_tokenizer = make_metaspace_tokenizer()
    hf_tokenizer.backend_tokenizer.add_tokens([AddedToken(text, normalized=False)])
    tokenizer = Tokenizer(hf_tokenizer, frozenset())
    token_id = hf_tokenizer.convert_tokens_to_ids(text)
    assert tokenizer.token_bytes(token_id) == meaning.encode()
    assert tokenizer.decode(tokenizer.encode("of the A"), skip_special_tokens=True) == "of the A"


def test_a_normalised_added_token_keeps_the_blank_that_it_swallowed() -> None:
    hf_tokenizer = make_metaspace_tokenizer()
    hf_tokenizer.backend_tokenizer.add_tokens([AddedToken("đem", normalized=True)])
    tokenizer = Tokenizer(hf_tokenizer, frozenset())
    ids = tokenizer.encode("the đem the", add_special_tokens=False)
    assert tokenizer.decode(ids) == "the đem the"
    assert shown(tokenizer, ids, skip=True) == "the đem the"


def test_a_model_without_an_unknown_token_may_have_added_tokens() -> None:
    backend = BackendTokenizer(models.WordLevel(vocab={"a": 0}))
    backend.decoder = make_metaspace_tokenizer().backend_tokenizer.decoder
    backend.add_tokens([AddedToken("\u2581x", normalized=False)])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())
    assert tokenizer.decode([0, 1]) == "a\u2581x"


@pytest.mark.parametrize("options", [{"lstrip": True, "rstrip": True}, {"single_word": True}])
def test_the_options_of_an_added_token_do_not_change_its_text(options: dict[str, bool]) -> None:
    for make, normalized in ((make_byte_tokenizer, True), (make_metaspace_tokenizer, False)):
        hf_tokenizer = make()
        token = AddedToken("đem", normalized=normalized, **options)
        hf_tokenizer.backend_tokenizer.add_tokens([token])
        tokenizer = Tokenizer(hf_tokenizer, frozenset())
        token_id = hf_tokenizer.convert_tokens_to_ids("đem")
        assert token_id in tokenizer.encode("the  đem  the")
        assert tokenizer.decode([token_id]) == "đem"


@all_kinds
@settings(max_examples=50)
@given(data=st.data(), skip=st.booleans())
def test_any_mix_of_tokens_streams_as_the_whole_decodes(
    kind: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer = with_added_tokens(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=20))
    assert shown(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@all_kinds
@settings(max_examples=50)
@given(data=st.data(), skip=st.booleans())
def test_what_the_backend_reads_right_decodes_as_it_says(
    kind: str, data: st.DataObject, skip: bool
) -> None:
    """Half characters of byte tokens aside: the backend gives up a whole run for one of them."""
    tokenizer = with_added_tokens(kind)
    backend: Any = tokenizer._backend
    misread = {only_id(tokenizer, text) for text in (*ADDED, *(f"[{text}]" for text in ADDED))}
    misread -= {only_id(tokenizer, text) for text in ("tool", "你好", "😀", "[tool]")}
    if kind == "sentencepiece":
        misread |= {token_id for token_id in range(3, 259)}
    allowed = [i for i in range(tokenizer.vocab_size) if i not in misread]
    ids = data.draw(st.lists(st.sampled_from(allowed), max_size=20))
    expected = backend.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(
    pieces=st.lists(
        st.one_of(st.integers(0, 286), st.sampled_from([*ADDED, *(f"[{t}]" for t in ADDED)])),
        max_size=20,
    )
)
def test_added_tokens_decode_as_if_their_content_were_spelt_in_bytes(
    pieces: list[int | str],
) -> None:
    tokenizer = with_added_tokens("byte-level")
    ids = [only_id(tokenizer, piece) if isinstance(piece, str) else piece for piece in pieces]
    spelt: list[int] = []
    for piece in pieces:
        spelt += byte_ids(piece.encode()) if isinstance(piece, str) else [piece]
    expected = make_byte_tokenizer_once().decode(spelt)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert shown(tokenizer, ids, skip=False) == expected


def test_a_token_without_text_does_not_take_the_place_of_the_first_word() -> None:
    """The blank of the first word is dropped, whatever stands before it without a text."""
    tokenizer = metaspace_tokenizer()
    the = tokenizer.encode("the", add_special_tokens=False)
    ids = [tokenizer.vocab_size + 1, BOS, *the, *the]
    assert shown(tokenizer, ids, skip=True) == tokenizer.decode(ids) == "the the"


def test_an_empty_token_has_no_text() -> None:
    vocab = {"": 0, "\u2581the": 1, "<unk>": 2}
    backend = BackendTokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.decoder = make_metaspace_tokenizer().backend_tokenizer.decoder
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())
    assert tokenizer.token_bytes(0) == b""
    for ids in ([0, 1, 1], [1, 0, 1], [0, 0, 1, 1, 0]):
        assert tokenizer.decode(ids) == backend.decode(ids) == "the the"
        assert shown(tokenizer, ids, skip=True) == "the the"


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


@all_kinds
@settings(max_examples=50)
@given(
    text=st.text(st.sampled_from("ab é你😀\n\u2581<>0x41đem[]|the"), max_size=30), bos=st.booleans()
)
def test_texts_are_encoded_as_the_backend_encodes_them(kind: str, text: str, bos: bool) -> None:
    tokenizer = with_added_tokens(kind)
    expected = tokenizer._backend.encode(text, add_special_tokens=bos).ids
    assert tokenizer.encode(text, add_special_tokens=bos) == expected


def test_texts_are_encoded_by_the_one_call_that_lets_other_threads_run() -> None:
    """``encode`` of the backend holds the interpreter lock, for seconds where a text is long."""
    tokenizer = Tokenizer(make_byte_tokenizer(), frozenset())
    backend = Mock(wraps=tokenizer._backend)
    tokenizer._backend = backend
    tokenizer.encode("hello")
    assert [call[0] for call in backend.method_calls] == ["encode_batch_fast"]


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
    with pytest.raises(InvalidRequestError, match="Send a prompt") as caught:
        metaspace_tokenizer().apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


# ---- long texts ----


@given(texts)
def test_no_token_stands_for_more_characters_than_the_longest_one_has(text: str) -> None:
    for tokenizer in (byte_tokenizer(), metaspace_tokenizer()):
        num_tokens = len(tokenizer.encode(text))

        assert len(text) <= num_tokens * tokenizer.max_token_chars


def bounded_tokenizer(max_tokens: int) -> Tokenizer:
    return Tokenizer(make_byte_tokenizer(), frozenset({IM_END}), max_tokens=max_tokens)


@pytest.mark.parametrize("text", ["é" * 1000, "xyz " * 500, "<|im_end|>" * 200, EMOJI_AND_CJK * 40])
def test_a_text_up_to_the_limit_is_the_same_tokens_as_without_one(text: str) -> None:
    expected = byte_tokenizer().encode(text)

    assert bounded_tokenizer(len(expected)).encode(text) == expected


@pytest.mark.parametrize("text", ["é" * 100_000, "xyz " * 100_000, "\0" * 100_000])
@pytest.mark.parametrize("param", ["prompt", "messages"])
def test_a_text_far_over_the_limit_is_refused_without_tokenising_all_of_it(
    text: str, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = bounded_tokenizer(20_000)
    pieces: list[str] = []
    encode = tokenizer._encode

    def counted(piece: str, add_special_tokens: bool) -> list[int]:
        pieces.append(piece)
        return encode(piece, add_special_tokens)

    monkeypatch.setattr(tokenizer, "_encode", counted)

    with pytest.raises(InvalidRequestError, match="more than 20000 tokens") as caught:
        tokenizer.encode(text, param=param)

    assert caught.value.param == param
    assert max(map(len, pieces)) < 10_000
    assert sum(map(len, pieces)) < len(text) / 2


def longest_wait_of_another_thread(work: Callable[[], object]) -> float:
    """The longest that a thread waits for a turn while ``work`` runs, as a share of the work."""
    longest, stop = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        before = time.perf_counter()
        while not stop.wait(0.001):
            longest = max(longest, time.perf_counter() - before)
            before = time.perf_counter()

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    work()
    took = time.perf_counter() - start
    stop.set()
    ticker.join()
    return longest / took


def test_other_threads_run_while_a_long_text_is_tokenised() -> None:
    text = "the <|im_end|> 你好 " * 20_000

    shares = (
        longest_wait_of_another_thread(lambda: byte_tokenizer().encode(text)) for _ in "12345"
    )

    assert any(share < 0.5 for share in shares), "one call holds the interpreter"


# ---- stop strings that are special tokens ------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("stop", "tokens", "shown"),
    [
        ("<|im_end|>", [*byte_ids(b"ab"), IM_END, *byte_ids(b"c")], "ab"),
        ("<|im_end|>x", [*byte_ids(b"ab"), IM_END, *byte_ids(b"xc")], "ab"),
        ("b<|im_end|>", [*byte_ids(b"ab"), IM_END, *byte_ids(b"xc")], "a"),
        ("b<|im_end|>x", [*byte_ids(b"ab"), IM_END, *byte_ids(b"xc")], "a"),
    ],
)
def test_a_stop_string_may_be_or_hold_a_special_token(
    stop: str, tokens: list[int], shown: str, skip: bool
) -> None:
    stream = stream_of(byte_tokenizer(), stop=(stop,), skip_special_tokens=skip)

    deltas, stopped = run(stream, tokens)

    assert stopped
    assert "".join(deltas) == shown


@pytest.mark.parametrize("stop", ["<|im_end|>y", "zb<|im_end|>", "a<|im_end|>b"])
def test_special_tokens_that_end_nothing_stay_hidden(stop: str) -> None:
    tokens = [*byte_ids(b"ab"), IM_END, *byte_ids("é".encode()[:1]), IM_START]
    tokens += [*byte_ids("é".encode()[1:]), *byte_ids(b"<|im_end|>c"), IM_END]

    deltas, stopped = run(stream_of(byte_tokenizer(), stop=(stop,)), tokens)

    assert not stopped
    assert "".join(deltas) == "abé<|im_end|>c"


@given(
    pieces=st.lists(st.tuples(st.text("ab<>", max_size=3), st.booleans()), max_size=8),
    stops=st.lists(st.text("ab<>", min_size=1, max_size=4), min_size=1, max_size=3),
    keep=st.booleans(),
)
def test_hidden_text_counts_and_is_never_shown(
    pieces: list[tuple[str, bool]], stops: list[str], keep: bool
) -> None:
    whole = "".join(text for text, _ in pieces)
    is_hidden = [hidden for text, hidden in pieces for _ in text]
    kept, stops_here = cut_by_hand(whole, stops, keep=keep)
    matcher = StopMatcher(stops, keep_stop=keep)

    shown, stopped = "", False
    for text, hidden in pieces:
        more, stopped = matcher.push(text, is_hidden=hidden)
        shown += more
        if stopped:
            break
    shown += "" if stopped else matcher.flush()

    assert stopped == stops_here
    assert shown == "".join(c for c, h in zip(kept, is_hidden, strict=False) if not h)
