"""Special tokens that a message merely writes about are text to the model, not control tokens.

A chat template writes its own special tokens between the contents of messages, and in the rendered
text the two look alike. So every special token inside a content gets a mark before the template
sees it. What comes out of the template unmarked is the template's own: it is written under another
name, which only a second tokenizer knows as a token. To that one, what was marked is text like any
other, so it is tokenised as if no special token had its name, together with what stands beside it.
"""

from __future__ import annotations

import re
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from sortserve.core.errors import InvalidRequestError

__all__ = ["PlainContent"]

_FIRST_MARK = 0xF0000
"""Characters for private use: planes 15 and 16 hold 131,068 of them."""


class PlainContent:
    """Marks special tokens in messages, and tokenises what a template made of them.

    Safe to use from several threads.

    Args:
        backend: the tokenizer; it is copied when the first message has a special token in it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._special = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._lock = threading.Lock()

    def marked(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str] | None:
        """The messages with marks in the special tokens of all their strings, and the mark.

        None where they have no special token: most have none, and need nothing of this.
        """
        if not any(map(self._pattern.search, _strings(messages))):
            return None
        mark = _unused_character(messages)
        return self._mark(messages, mark), mark

    def _mark(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(lambda found: _with_mark(found[0], mark), value)
        if isinstance(value, list):
            return [self._mark(item, mark) for item in value]
        if isinstance(value, Mapping):
            return {name: self._mark(item, mark) for name, item in value.items()}
        return value

    def encode(self, text: str, mark: str) -> list[int]:
        """Token ids of a rendered text; special tokens that are marked in it are text.

        Raises:
            InvalidRequestError: the tokenizer has no other way to write one.
        """
        with self._lock:
            copy, names, ids = self._copy
        text = self._pattern.sub(lambda found: names[found[0]], text).replace(mark, "")
        [encoding] = copy.encode_batch_fast([text], add_special_tokens=False)
        special = set(self._special.values())
        for token_id in encoding.ids:
            if token_id in special and token_id not in ids:
                raise InvalidRequestError(
                    f"messages hold {copy.id_to_token(token_id)!r}, which this tokenizer can only "
                    "write as a control token. Leave it out.",
                    param="messages",
                )
        return [ids.get(token_id, token_id) for token_id in encoding.ids]

    @cached_property
    def _copy(self) -> tuple[Backend, dict[str, str], dict[int, int]]:
        """A tokenizer whose special tokens have other names, these by name, and ids to ours."""
        copy = Backend.from_str(self._backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        # Of a text, the copy knows no special token by its own name ...
        copy.encode_special_tokens = True
        names: dict[str, str] = {}
        ids: dict[int, int] = {}
        nonce = secrets.token_hex(16)  # nobody can write such a name into a message
        added = self._backend.get_added_tokens_decoder()
        for index, (content, token_id) in enumerate(self._special.items()):
            name = f"\U0010fffd{nonce}.{index}\U0010fffc"
            token = added[token_id]
            # ... but each by another, as a token that is not special.
            copy.add_tokens(
                [
                    AddedToken(
                        name,
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=False,
                        special=False,
                    )
                ]
            )
            names[content] = name
            new_id = copy.token_to_id(name)
            assert new_id is not None, "it has just been added"
            ids[new_id] = token_id
        return copy, names, ids


def _with_mark(token: str, mark: str) -> str:
    """Inside, so that a template which trims or splits at blanks leaves it there."""
    return token[0] + mark + token[1:]


def _strings(value: Any) -> Iterator[str]:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _unused_character(messages: list[dict[str, Any]]) -> str:
    """A character that no string of the messages has."""
    used = {character for text in _strings(messages) for character in text}
    return next(chr(code) for code in range(_FIRST_MARK, sys.maxunicode) if chr(code) not in used)
