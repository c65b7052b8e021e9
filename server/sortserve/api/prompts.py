"""From the prompt or the messages of a body to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sortserve.api.interfaces import Tokenizer
from sortserve.api.problems import shortened
from sortserve.errors import InvalidRequestError

__all__ = [
    "ChatPrompt",
    "Prompt",
    "TextPrompt",
    "TokenPrompt",
    "check_token_ids",
    "encode_all",
    "exactly_one",
    "read_messages",
    "read_prompt",
    "read_prompts",
]

THREAD_FROM_CHARS = 20_000
"""Prompts from this length on are tokenised on a thread: they would hold up every stream."""
CHARS_PER_TOKEN = 4
RESERVED_TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "add_generation_prompt"})
"""Names that ``chat_template_kwargs`` would take from the tokenizer's method."""


class Prompt(Protocol):
    """One prompt that is not tokenised yet."""

    @property
    def num_chars(self) -> int:
        """Characters to tokenise."""

    @property
    def num_tokens_estimate(self) -> int:
        """Its tokens, by its length alone."""

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Its tokens."""


@dataclass(frozen=True)
class TextPrompt:
    """A text."""

    text: str
    add_special_tokens: bool = True

    @property
    def num_chars(self) -> int:
        """Characters to tokenise."""
        return len(self.text)

    @property
    def num_tokens_estimate(self) -> int:
        """Its tokens, by its length alone."""
        return len(self.text) // CHARS_PER_TOKEN + 1

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Its tokens."""
        return tokenizer.encode(self.text, add_special_tokens=self.add_special_tokens)


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids, checked against the vocabulary."""

    token_ids: list[int]
    num_chars: int = 0

    @property
    def num_tokens_estimate(self) -> int:
        """Its tokens."""
        return len(self.token_ids)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Its tokens."""
        return self.token_ids


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation for the model's chat template."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_chars(self) -> int:
        """Characters to tokenise, without those of the template."""
        return sum(_num_chars(message["content"]) for message in self.messages)

    @property
    def num_tokens_estimate(self) -> int:
        """Its tokens, by its length alone."""
        return self.num_chars // CHARS_PER_TOKEN + 1

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Its tokens; the tokenizer raises ``InvalidRequestError`` where the template fails."""
        return tokenizer.apply_chat_template(
            self.messages,
            add_generation_prompt=self.add_generation_prompt,
            **self.template_arguments,
        )


async def encode_all(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenise prompts, long ones off the event loop."""
    if sum(prompt.num_chars for prompt in prompts) < THREAD_FROM_CHARS:
        return [prompt.encode(tokenizer) for prompt in prompts]
    return await asyncio.to_thread(lambda: [prompt.encode(tokenizer) for prompt in prompts])


def exactly_one(prompt: object, messages: object) -> None:
    """Refuse both and neither.

    Raises:
        InvalidRequestError: ``param`` is ``prompt``.
    """
    if (prompt is None) == (messages is None):
        given = "both were given" if prompt is not None else "neither was given"
        raise InvalidRequestError(
            f"Give either prompt or messages, exactly one of the two; {given}.", param="prompt"
        )


def read_prompt(
    value: object, param: str, vocab_size: int, *, add_special_tokens: bool
) -> TextPrompt | TokenPrompt:
    """One prompt: a text or token ids."""
    if isinstance(value, str):
        return TextPrompt(value, add_special_tokens)
    if isinstance(value, list):
        return TokenPrompt(check_token_ids(value, param, vocab_size))
    raise _not_allowed(param, value, "a string or a list of token ids")


def read_prompts(
    value: object, vocab_size: int, *, add_special_tokens: bool
) -> list[TextPrompt | TokenPrompt]:
    """The four forms of ``prompt`` that OpenAI's completions have, as a list of prompts."""
    if value is None:
        raise InvalidRequestError("prompt is missing; it is required.", param="prompt")
    is_batch = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    if not is_batch:
        if not isinstance(value, str | list) or value == []:
            allowed = "a string, a list of strings, token ids or a list of lists of token ids"
            raise _not_allowed("prompt", value, allowed)
        return [read_prompt(value, "prompt", vocab_size, add_special_tokens=add_special_tokens)]
    assert isinstance(value, list)
    return [
        read_prompt(item, f"prompt.{i}", vocab_size, add_special_tokens=add_special_tokens)
        for i, item in enumerate(value)
    ]


def check_token_ids(values: list[Any], param: str, vocab_size: int) -> list[int]:
    """Token ids that the model knows.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of the first that is none.
    """
    for i, value in enumerate(values):
        if type(value) is not int or not 0 <= value < vocab_size:
            raise _not_allowed(f"{param}.{i}", value, f"a token id from 0 to {vocab_size - 1}")
    return values


def read_messages(
    values: list[Any],
    *,
    add_generation_prompt: bool | None,
    template_arguments: Mapping[str, Any] | None,
) -> ChatPrompt:
    """A conversation for the template, which reads contents as texts or as lists of parts.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of what is wrong.
    """
    if not values:
        raise _not_allowed("messages", values, "a list of at least one message")
    for name in template_arguments or {}:
        if name in RESERVED_TEMPLATE_ARGUMENTS:
            raise InvalidRequestError(
                f"chat_template_kwargs.{name} is not allowed: the server sets it.",
                param=f"chat_template_kwargs.{name}",
            )
    return ChatPrompt(
        [_read_message(value, f"messages.{i}") for i, value in enumerate(values)],
        add_generation_prompt=add_generation_prompt is not False,
        template_arguments=template_arguments or {},
    )


def _read_message(value: object, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _not_allowed(param, value, "an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or not role:
        raise _not_allowed(f"{param}.role", role, "a string such as system, user or assistant")
    for name in ("tool_calls", "function_call", "audio", "prefix"):
        if value.get(name):
            raise InvalidRequestError(f"{param}.{name} is not supported.", param=f"{param}.{name}")
    content = _read_content(value.get("content"), f"{param}.content")
    # OpenAI's newer models call the system role "developer"; templates know the old name only.
    return {**value, "role": "system" if role == "developer" else role, "content": content}


def _read_content(value: object, param: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _not_allowed(param, value, "a string, or a list of parts of type text")
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise _not_allowed(f"{param}.{i}", part, 'parts of the form {"type": "text", "text"}')
        if not isinstance(part.get("text"), str):
            raise _not_allowed(f"{param}.{i}.text", part.get("text"), "a string")
    return value


def _num_chars(content: str | list[dict[str, Any]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(p["text"]) for p in content)


def _not_allowed(param: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}={shortened(value)} is not allowed: it must be {allowed}.", param=param
    )
