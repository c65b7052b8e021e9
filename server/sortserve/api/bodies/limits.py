"""The most that a request may hold: every list, string and object a client sends has a maximum.

``docs/api.md`` has the same table, and a test that compares the two. What could be large is counted
in the bytes of the body, before anything is built of it (``json_scan.py``); the rest is small by
then, and checked where it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from sortserve.core.errors import CONTEXT_LENGTH_EXCEEDED

__all__ = ["BodyLimits", "FieldLimit", "max_encoded_tokens"]

MAX_FIELDS = 256
"""Fields of a body."""
MAX_KEY_CHARS = 256
"""Characters of a field's name, at any depth."""
MAX_NUMBER_CHARS = 4300
"""Characters of a number: what Python reads."""
MAX_TOKEN_IDS = 262_144
"""Token ids of all prompts together; more where the context is longer than half of it."""
MIN_ENCODED_TOKENS = 16_384
"""Tokens that ``/tokenize`` and ``/detokenize`` take, however short the context."""
MIN_TOKENIZE_CHARS = 524_288
"""Characters that ``/tokenize`` takes, however short the context."""

MAX_MESSAGES = 4096
MAX_MESSAGE_FIELDS = 32
"""Fields of a message, and of a part of its content."""
MAX_PARTS = 1024
"""Parts of a message's content."""
MAX_ROLE_CHARS = 64
MAX_MESSAGE_VALUES = 65_536
"""Strings, lists and objects in all messages together, names of fields too."""
MAX_MESSAGE_DEPTH = 32

MAX_TEMPLATE_VARIABLES = 64
"""Names in ``chat_template_kwargs``."""
MAX_TEMPLATE_VALUES = 8192
"""Strings, lists and objects in ``chat_template_kwargs``, names too."""
MAX_TEMPLATE_DEPTH = 32

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
"""Characters of one stop string."""
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_BUDGET_FIELDS = 16
MAX_ECHO_CHARS = 4_194_304
"""Characters of prompts that ``echo`` repeats, over all answers."""
MAX_LOGPROBS_PER_REPLY = 1_048_576
"""Log probabilities, of tokens and rivals, that a reply which is not streamed may have to hold."""
MAX_NAME_CHARS = 256
"""Characters of ``model`` and of ``cache_salt``."""

MAX_FORMAT_FIELDS = 16
"""Fields of ``format``, ``response_format`` and ``structured_outputs``, at their top."""
MAX_FORMAT_CHARS = 131_072
"""Characters of a schema, a grammar or an expression, and of what is around it."""
MAX_FORMAT_VALUES = 16_384
MAX_FORMAT_DEPTH = 64

MAX_TOOLS = 128

MAX_OTHER_VALUES = 4096
"""Strings, lists and objects in all other fields together, names too."""
MAX_OTHER_NUMBERS = 8192
MAX_OTHER_CHARS = 65_536
"""Characters of all other fields together."""
MAX_OTHER_DEPTH = 32


FORMAT_FIELDS = (
    *("format", "response_format", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
"""Fields that may hold a schema or a grammar; ``tools`` may, too."""


def max_encoded_tokens(max_model_len: int) -> int:
    """Tokens of the longest text that is tokenised to its end."""
    return max(2 * max_model_len, MIN_ENCODED_TOKENS)


@dataclass(frozen=True, kw_only=True)
class FieldLimit:
    """The most that one field of a body may hold, at any depth."""

    max_values: int
    """Strings, lists and objects; the names in an object count as strings."""
    max_numbers: int
    """Entries of lists and objects, whatever they are."""
    max_chars: int
    """Characters of all strings together."""
    max_string_chars: int
    """Characters of one string."""
    max_depth: int
    """Lists and objects around each other."""
    code: str | None = None
    """Of the refusal of too many characters."""


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """The limits that depend on the model and the settings."""

    max_model_len: int
    max_token_chars: int
    """Characters of the tokenizer's longest token."""
    max_sequences: int
    """Sequences of one request: prompts times ``n``."""

    @property
    def max_text_chars(self) -> int:
        """Characters of one prompt, or of all messages together.

        No token stands for more than ``max_token_chars`` characters, so a longer text cannot fit
        the context. Where a normalizer drops characters it might; it is refused all the same.
        """
        return self.max_model_len * self.max_token_chars

    @property
    def max_tokenize_chars(self) -> int:
        """Characters that ``/tokenize`` takes."""
        return max(self.max_text_chars, MIN_TOKENIZE_CHARS)

    @property
    def max_token_ids(self) -> int:
        """Token ids of all prompts together."""
        return max(MAX_TOKEN_IDS, 2 * self.max_model_len)

    @property
    def max_encoded_tokens(self) -> int:
        """Token ids that ``/detokenize`` takes."""
        return max_encoded_tokens(self.max_model_len)

    @cached_property
    def fields(self) -> Mapping[str, FieldLimit]:
        """The fields that may be large. All others share ``others``."""
        # The exact limits of a prompt depend on its form and its route: prompts.py has them.
        text = self.max_tokenize_chars
        prompt = FieldLimit(
            max_values=4096,  # a list too long is refused for its sequences, by their number
            max_numbers=self.max_token_ids,
            max_chars=self.max_sequences * text,
            max_string_chars=text,
            max_depth=2,
            code=CONTEXT_LENGTH_EXCEEDED,
        )
        messages = FieldLimit(
            max_values=MAX_MESSAGE_VALUES,
            max_numbers=MAX_MESSAGE_VALUES,
            max_chars=text,
            max_string_chars=text,
            max_depth=MAX_MESSAGE_DEPTH,
            code=CONTEXT_LENGTH_EXCEEDED,
        )
        tokens = FieldLimit(
            max_values=16,
            max_numbers=self.max_encoded_tokens,
            max_chars=MAX_OTHER_CHARS,
            max_string_chars=MAX_OTHER_CHARS,
            max_depth=2,
        )
        variables = FieldLimit(
            max_values=MAX_TEMPLATE_VALUES,
            max_numbers=MAX_TEMPLATE_VALUES,
            max_chars=text,
            max_string_chars=text,
            max_depth=MAX_TEMPLATE_DEPTH,
        )
        format_ = FieldLimit(
            max_values=MAX_FORMAT_VALUES,
            max_numbers=MAX_FORMAT_VALUES,
            max_chars=MAX_FORMAT_CHARS,
            max_string_chars=MAX_FORMAT_CHARS,
            max_depth=MAX_FORMAT_DEPTH,
        )
        return {
            **dict.fromkeys((*FORMAT_FIELDS, "tools", "text"), format_),
            "prompt": prompt,
            "messages": messages,
            "input": messages,
            "instructions": messages,
            "tokens": tokens,
            "chat_template_kwargs": variables,
        }

    @cached_property
    def others(self) -> FieldLimit:
        """All other fields together, known and unknown."""
        return FieldLimit(
            max_values=MAX_OTHER_VALUES,
            max_numbers=MAX_OTHER_NUMBERS,
            max_chars=MAX_OTHER_CHARS,
            max_string_chars=MAX_OTHER_CHARS,
            max_depth=MAX_OTHER_DEPTH,
        )
