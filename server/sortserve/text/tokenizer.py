"""Text to tokens, and tokens to text as they come: never half a character, cut at stop strings.

A token stands for bytes, and a character may be spread over several tokens. So each token is looked
up as bytes once, and a stream is an incremental UTF-8 decoder over them: constant work per token,
and exactly those bytes wait that may still become a character.

Threads: a ``Tokenizer`` may be used from several at once. Encoding and decoding only read the
underlying tokenizer; truncation and padding, which Hugging Face's own ``__call__`` sets as it goes,
are switched off once and never touched. Chat templates render in a process of their own.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from sortserve.core.errors import CONTEXT_LENGTH_EXCEEDED, InvalidRequestError
from sortserve.core.sampling_params import SamplingParams
from sortserve.text.byte_tokens import BYTE_OF, decoder_kinds, whole_text
from sortserve.text.chat_template import ChatTemplate
from sortserve.text.grammars import Grammars
from sortserve.text.plain_content import PlainContent
from sortserve.text.stop_strings import StopMatcher
from sortserve.text.tokenizer_info import tokenizer_info

__all__ = ["TextStream", "Tokenizer"]

_PIECE_CHARS = 8192
_TOKENS_OF_BORDER = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A Hugging Face fast tokenizer and the ids that end a generation.

    Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2) and sentencepiece style with or without byte
    fall-back (Llama 2, Mistral) are understood down to the byte.

    Args:
        hf_tokenizer: transformers' tokenizer.
        eos_token_ids: what ends a generation.
        chat_template: that of the tokenizer, where it has been prepared already.
        model_vocab_size: rows of the model's embedding; None: as many as the tokenizer needs.
        max_tokens: a text that surely has more is refused, before memory is spent on all of them.
    """

    def __init__(
        self,
        hf_tokenizer: PreTrainedTokenizerFast,
        eos_token_ids: frozenset[int],
        chat_template: ChatTemplate | None = None,
        *,
        model_vocab_size: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._chat_template = chat_template or ChatTemplate(hf_tokenizer)
        self._backend = hf_tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._plain = PlainContent(self._backend)
        self.info = tokenizer_info(hf_tokenizer)
        """Special tokens and chat template, for programs that have none of it."""
        self.allow_special_in_content = False
        """Whether special tokens that are written out in messages count as such."""
        self.eos_token_ids = eos_token_ids
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        num_ids = max(vocabulary.values()) + 1
        self.vocab_size: int = min(num_ids, model_vocab_size or num_ids)
        """One above the largest id that tokenizer and model both know. Either may know more: a
        model's vocabulary may be padded, and tokens may have been added without new embeddings."""
        self.grammars = Grammars(self._backend, model_vocab_size or num_ids, num_ids, eos_token_ids)
        """Compiles what answers must look like."""
        self.tool_dialect = self._chat_template.tool_dialect
        """The form in which the template has tools called; None: it knows none."""
        self.max_token_chars: int = max(map(len, vocabulary))
        """No token stands for more characters. A byte of a byte-level token counts as one."""
        self._max_tokens = max_tokens
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        kinds = set(decoder_kinds(self._backend.decoder))
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._anchor: list[int] = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        self._bytes_by_id: dict[int, bytes] = {}
        self._text_by_id: dict[int, str | None] = {}
        self._literals: dict[int, bytes] = {
            token_id: token.content.encode()
            for token_id, token in added.items()
            if self._is_literal(token_id, token)
        }

    def encode(
        self, text: str, add_special_tokens: bool = True, *, param: str = "prompt"
    ) -> list[int]:
        """Token ids of a text; special tokens written out in it count as such.

        Raises:
            InvalidRequestError: the text is not valid Unicode, is far too long, or holds a token
                that the model has no embedding for; ``param`` is the field to blame.
        """
        ids = self._encode(self._checked(text, param), add_special_tokens)
        self._check_known(ids, param)
        return ids

    def _checked(self, text: str, param: str) -> str:
        """The text, if it can be tokenised."""
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"{param} is not valid Unicode: character {error.start} is half of a surrogate "
                "pair. Send the whole character.",
                param=param,
            ) from None
        if self._max_tokens is not None and num_bytes > self._max_tokens:
            self._check_length(text, self._max_tokens, param)
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch call gives up the interpreter lock; ``encode`` keeps it, seconds on megabytes.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _check_known(self, token_ids: Sequence[int], param: str) -> None:
        largest = max(token_ids, default=0)
        if largest >= self.vocab_size:
            token = self._backend.id_to_token(largest)
            raise InvalidRequestError(
                f"{param} holds the token {token!r}, whose id {largest} is beyond the model's "
                f"vocabulary: ids go from 0 to {self.vocab_size - 1}. Leave it out.",
                param=param,
            )

    def _check_length(self, text: str, most: int, param: str) -> None:
        """Refuse a text that surely has more than ``most`` tokens, in little memory.

        A token takes more than a hundred bytes while its text is tokenised, and every byte of the
        text may be one. So the pieces of a long text are tokenised first, one by one, which nearly
        gives its number of tokens: a border between two of them adds a few.
        """
        num_tokens = 0
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            num_tokens += max(0, len(self._encode(piece, False)) - _TOKENS_OF_BORDER)
            if num_tokens > most:
                raise InvalidRequestError(
                    f"{param} has more than {most} tokens: that is too long.",
                    param=param,
                    code=CONTEXT_LENGTH_EXCEEDED,
                )

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Bytes that are no character come out as U+FFFD.

        An id outside the vocabulary (a model's may be padded) has no text. A stream of the same
        tokens gives the same text.
        """
        hidden = self.special_token_ids if skip_special_tokens else frozenset()
        pieces: list[bytes] = []
        for token_id in token_ids:
            if token_id not in hidden and (piece := self.token_bytes(token_id)):
                pieces.append(piece if pieces else self.first_token_bytes(token_id))
        return b"".join(pieces).decode(errors="replace")

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """Messages to token ids, through the checkpoint's own template.

        Special tokens are the template's: those that a message writes out are text, unless
        ``allow_special_in_content``.

        Blocks its thread while the template renders, no longer than the renderer's limits.

        Args:
            messages: ``{"role": ..., "content": ...}`` and whatever else the template reads. A
                content is a text, or a list of parts of type text; the template gets the form it
                reads.
            add_generation_prompt: end with the opening of the assistant's turn.
            template_kwargs: variables of the template, ``tools`` and ``documents`` among them.

        Raises:
            InvalidRequestError: there is no template, it refuses these messages, it was stopped at
                a limit, or they hold a token that the model has no embedding for.
            OverloadedError: too many others are being rendered.
        """
        marked = None if self.allow_special_in_content else self._plain.marked(messages)
        text = self._chat_template.render(
            messages if marked is None else marked[0],
            add_generation_prompt=add_generation_prompt,
            variables=template_kwargs,
        )
        if marked is None:
            return self.encode(text, add_special_tokens=False, param="messages")
        ids = self._plain.encode(self._checked(text, "messages"), marked[1])
        self._check_known(ids, "messages")
        return ids

    def convert_id_to_token_text(self, token_id: int) -> tuple[str, bytes]:
        """One token as text and as bytes, as logprobs need it.

        The bytes are exact. The text of half a character is U+FFFD.
        """
        data = self.token_bytes(token_id)
        return data.decode(errors="replace"), data

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that something precedes; b"" for an id that has no token."""
        data = self._bytes_by_id.get(token_id)
        if data is None:
            data = self._bytes_by_id[token_id] = self._look_up_bytes(token_id)
        return data

    def token_text(self, token_id: int) -> str | None:
        """``token_bytes`` as text; None if they are not whole characters."""
        try:
            return self._text_by_id[token_id]
        except KeyError:
            text = self._text_by_id[token_id] = whole_text(self.token_bytes(token_id))
            return text

    def first_token_bytes(self, token_id: int) -> bytes:
        """What a token adds to an empty text: sentencepiece drops one leading space there."""
        data = self.token_bytes(token_id)
        if self._is_byte_level or not data.startswith(b" ") or token_id in self._literals:
            return data
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def _is_literal(self, token_id: int, token: AddedToken) -> bool:
        """Whether the text of an added token is its content, whatever the decoder reads in it.

        Always in byte-level BPE. In sentencepiece a normalised one has swallowed the blank before
        it; and the model may write the token itself, for a byte, or for a piece that its
        conversion lists as added too (runs of blanks): then the decoder knows what it means.
        """
        if self._is_byte_level:
            return True
        if token.normalized:
            return False
        model = self._backend.model
        if self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token.content):
            return bool(model.id_to_token(token_id) is None)
        try:
            return [piece.id for piece in model.tokenize(token.content)] != [token_id]
        except Exception:  # what tokenizers raises where a model has no token for the unknown
            return True

    def _look_up_bytes(self, token_id: int) -> bytes:
        if token_id in self._literals:
            return self._literals[token_id]
        token: str | None = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._is_byte_level:
            if all(character in BYTE_OF for character in token):
                return bytes(BYTE_OF[character] for character in token)
            return token.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], base=16)])
        before: str = self._backend.decode(self._anchor, skip_special_tokens=False)
        both: str = self._backend.decode([*self._anchor, token_id], skip_special_tokens=False)
        return both[len(before) :].encode()


class TextStream:
    """The text of one generation, token by token.

    All deltas and what ``finish`` returns, put together, are the text of the generation: what the
    output adds to the prompt's text, cut at the first stop string. The token that ends it (end of
    sequence, or a stop token) is not pushed. Special tokens count for stop strings where they are
    not shown, too. A stop string that is complete before ``min_tokens`` tokens are out is passed
    over.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if params.skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_between_characters = True
        """No half of a character waits in the decoder."""
        self._matcher = StopMatcher(params.stop, keep_stop=params.include_stop_str_in_output)
        self._has_stops = bool(params.stop)
        self._is_empty = not any(map(self._is_shown, prompt_token_ids))
        self._tokens_to_go = params.min_tokens
        self._is_stopped = False

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string has ended the generation.

        Nothing may be pushed after that.
        """
        assert not self._is_stopped, "a token after a stop string"
        self._tokens_to_go -= 1
        if token_id in self._hidden and self._has_stops:
            text = self._tokenizer.token_bytes(token_id).decode(errors="replace")
            return self._show(text, is_hidden=True)
        return self._show(self._decode(token_id))

    def _decode(self, token_id: int) -> str:
        """The characters that the token completes.

        Most tokens are whole characters and stand between others: their text is looked up.
        """
        if self._is_between_characters and not self._is_empty and token_id not in self._hidden:
            text = self._tokenizer.token_text(token_id)
            if text is not None:
                return text
        text = self._decoder.decode(self._bytes(token_id))
        self._is_between_characters = not self._decoder.getstate()[0]
        return text

    def finish(self) -> str:
        """The text held back so far: the generation is over. Empty after a stop string."""
        if self._is_stopped:
            return ""
        text, _ = self._show(self._decoder.decode(b"", final=True))
        return text + self._matcher.flush()

    def _is_shown(self, token_id: int) -> bool:
        return token_id not in self._hidden and bool(self._tokenizer.token_bytes(token_id))

    def _bytes(self, token_id: int) -> bytes:
        if not self._is_shown(token_id):
            return b""
        if self._is_empty:
            self._is_empty = False
            return self._tokenizer.first_token_bytes(token_id)
        return self._tokenizer.token_bytes(token_id)

    def _show(self, text: str, *, is_hidden: bool = False) -> tuple[str, bool]:
        text, self._is_stopped = self._matcher.push(
            text, may_stop=self._tokens_to_go <= 0, is_hidden=is_hidden
        )
        return text, self._is_stopped
