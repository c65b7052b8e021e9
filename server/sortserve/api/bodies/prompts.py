"""From the prompt or the messages of a body to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from sortserve.api.bodies.limits import MAX_MESSAGE_FIELDS, MAX_ROLE_CHARS
from sortserve.api.bodies.messages import check_length, not_allowed, read_calls, read_content
from sortserve.api.interfaces import Tokenizer
from sortserve.api.text_threads import TextThreads
from sortserve.core.errors import CONTEXT_LENGTH_EXCEEDED, InvalidRequestError

__all__ = [
    "ChatPrompt",
    "Prompt",
    "TextPrompt",
    "TokenPrompt",
    "check_chars",
    "check_token_ids",
    "encode_all",
    "exactly_one",
    "read_messages",
    "read_prompt",
    "read_prompts",
]

_CALLS = ("tool_calls",)
THREAD_FROM_CHARS = 2048
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

    @cached_property
    def num_chars(self) -> int:
        """Characters of every string that the template is given, but for the names of fields."""
        return _count_chars(self.messages) + _count_chars(dict(self.template_arguments))

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


async def encode_all(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, threads: TextThreads, *, max_tokens: int
) -> list[list[int]]:
    """Tokenise prompts, off the event loop unless they are short texts.

    The first that has more than ``max_tokens`` is the last: the request will be refused for it.
    """

    def encode() -> list[list[int]]:
        encoded: list[list[int]] = []
        for prompt in prompts:
            encoded.append(prompt.encode(tokenizer))
            if len(encoded[-1]) > max_tokens:
                break
        return encoded

    num_chars = sum(prompt.num_chars for prompt in prompts)
    is_chat = any(isinstance(prompt, ChatPrompt) for prompt in prompts)  # a template is a program
    if num_chars < THREAD_FROM_CHARS and not is_chat:
        return encode()
    return await threads.run(encode)


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
    value: object, param: str, vocab_size: int, *, max_chars: int, add_special_tokens: bool
) -> TextPrompt | TokenPrompt:
    """One prompt: a text or token ids.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of what is wrong.
    """
    if isinstance(value, str):
        check_chars(len(value), param, max_chars)
        return TextPrompt(value, add_special_tokens)
    if isinstance(value, list):
        return TokenPrompt(check_token_ids(value, param, vocab_size))
    raise not_allowed(param, value, "a string or a list of token ids")


def read_prompts(
    value: object, vocab_size: int, *, max_chars: int, add_special_tokens: bool
) -> list[TextPrompt | TokenPrompt]:
    """The four forms of ``prompt`` that OpenAI's completions have, as a list of prompts."""
    if value is None:
        raise InvalidRequestError("prompt is missing; it is required.", param="prompt")
    is_batch = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    if not is_batch:
        if not isinstance(value, str | list) or value == []:
            allowed = "a string, a list of strings, token ids or a list of lists of token ids"
            raise not_allowed("prompt", value, allowed)
        items = {"prompt": value}
    else:
        assert isinstance(value, list)
        items = {f"prompt.{i}": item for i, item in enumerate(value)}
    return [
        read_prompt(
            item, param, vocab_size, max_chars=max_chars, add_special_tokens=add_special_tokens
        )
        for param, item in items.items()
    ]


def check_token_ids(values: list[Any], param: str, vocab_size: int) -> list[int]:
    """Token ids that the model knows.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of the first that is none.
    """
    for i, value in enumerate(values):
        if type(value) is not int or not 0 <= value < vocab_size:
            raise not_allowed(f"{param}.{i}", value, f"a token id from 0 to {vocab_size - 1}")
    return values


def read_messages(
    values: list[Any],
    *,
    max_chars: int,
    add_generation_prompt: bool | None,
    template_arguments: Mapping[str, Any] | None,
    name: str = "messages",
    places: Sequence[str] | None = None,
) -> ChatPrompt:
    """A conversation for the template, which reads contents as texts or as lists of parts.

    ``name`` is the field that it came in, and ``places`` are those of its messages, if they are
    not ``name.0`` and so on.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of what is wrong.
    """
    if not values:
        raise not_allowed(name, values, "a list of at least one message")
    for argument in template_arguments or {}:
        if argument in RESERVED_TEMPLATE_ARGUMENTS:
            raise InvalidRequestError(
                f"chat_template_kwargs.{argument} is not allowed: the server sets it.",
                param=f"chat_template_kwargs.{argument}",
            )
    if places is None:
        places = [f"{name}.{i}" for i in range(len(values))]
    prompt = ChatPrompt(
        [_read_message(value, place) for value, place in zip(values, places, strict=True)],
        add_generation_prompt=add_generation_prompt is not False,
        template_arguments=template_arguments or {},
    )
    check_chars(prompt.num_chars, name, max_chars)
    return prompt


def check_chars(num_chars: int, param: str, max_chars: int) -> None:
    """Refuse a text that cannot fit.

    Raises:
        InvalidRequestError: ``param`` is given.
    """
    if num_chars > max_chars:
        raise InvalidRequestError(
            f"{param} has {num_chars} characters; {max_chars} are allowed, as no more can fit the "
            "context.",
            param=param,
            code=CONTEXT_LENGTH_EXCEEDED,
        )


def _count_chars(value: object) -> int:
    """Characters of all strings in a JSON value, but for the names of fields."""
    num_chars, pending = 0, [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            num_chars += len(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return num_chars


def _read_message(value: object, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise not_allowed(param, value, "an object with role and content")
    check_length(value, param, MAX_MESSAGE_FIELDS, "fields")
    role = value.get("role")
    if not isinstance(role, str) or not role:
        raise not_allowed(f"{param}.role", role, "a string such as system, user or assistant")
    check_length(role, f"{param}.role", MAX_ROLE_CHARS, "characters")
    if role == "assistant" and value.get("tool_calls"):
        value = {**value, "tool_calls": read_calls(value["tool_calls"], f"{param}.tool_calls")}
    for name in ("function_call", "audio", "prefix", *(() if role == "assistant" else _CALLS)):
        if value.get(name):
            raise InvalidRequestError(f"{param}.{name} is not supported.", param=f"{param}.{name}")
    content = read_content(value, role, f"{param}.content")
    # OpenAI's newer models call the system role "developer"; templates know the old name only.
    return {**value, "role": "system" if role == "developer" else role, "content": content}
