"""The chat templates of a checkpoint: compiled and tried once, rendered within limits.

Contents come in two forms. OpenAI's clients send a text or a list of parts, ``[{"type": "text",
"text": "..."}]``; a template reads one of the two, or both, and drops or misprints what it does not
read. So each template is tried with both before it is used, role by role, and gets contents in the
form that it shows.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from sortserve.core.errors import CheckpointError, InvalidRequestError
from sortserve.text.template_renderer import (
    Renderer,
    TemplateFailed,
    TemplateStopped,
    shared_renderer,
)
from sortserve.text.tool_dialects import dialect_of

__all__ = ["ChatTemplate", "roles_of_parts"]

logger = logging.getLogger(__name__)

Message = dict[str, Any]

_ARGUMENTS_THAT_ARE_VARIABLES = {"tools", "documents", "continue_final_message"}
_ROLES = ("user", "system", "assistant")
_TRIALS: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
"""Conversations to try a template with: some insist on a system message, or refuse one."""
_TRIAL_TOOL = {"name": "f", "description": "A trial.", "parameters": {"type": "object"}}
_TRIAL_VARIABLES: dict[str, dict[str, Any]] = {
    "default": {},
    "tool_use": {"tools": [{"type": "function", "function": _TRIAL_TOOL}]},
}
"""The templates that requests use, by name, and what they come with."""


class ChatTemplate:
    """Messages to a text, as transformers' ``apply_chat_template`` writes it.

    Safe to use from several threads; a rendering blocks its thread until the text is there or a
    limit of the renderer is met.

    Args:
        hf_tokenizer: has the templates, and the special tokens that they may name.
        renderer: runs them; by default the one of this process.
    """

    def __init__(
        self, hf_tokenizer: PreTrainedTokenizerFast, renderer: Renderer | None = None
    ) -> None:
        self._hf = hf_tokenizer
        self._renderer = renderer
        self._parts: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()

    @property
    def exists(self) -> bool:
        """Whether the checkpoint has any."""
        return bool(self._hf.chat_template)

    @property
    def tool_dialect(self) -> str | None:
        """The form in which its model calls tools (``tool_dialects``); None: it knows none."""
        return dialect_of(_named_templates(self._hf.chat_template).values() if self.exists else ())

    def prepare(self) -> None:
        """Compile every template, and find out what it reads; once is enough.

        Says in the log where a template loses what the user says.

        Raises:
            CheckpointError: a template is no text, or does not compile.
            EngineError: the process that renders cannot be started.
        """
        with self._lock:
            if not self._parts and self.exists:
                self._parts = {
                    template: self._inspect(template, name)
                    for name, template in _named_templates(self._hf.chat_template).items()
                }

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The text of a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}``, contents as texts or as lists of parts.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: variables of the template, ``tools`` and ``documents`` among them.

        Raises:
            InvalidRequestError: there is no template, it refuses these messages, or it needs more
                for them than it may take.
            OverloadedError: too many others are being rendered.
        """
        if not self.exists:
            raise InvalidRequestError(
                "messages cannot be used: this checkpoint has no chat template. Send a prompt.",
                param="messages",
            )
        for name in variables:
            if name in self._reserved_names():
                raise InvalidRequestError(
                    f"chat_template_kwargs.{name} is not a variable of the chat template.",
                    param=f"chat_template_kwargs.{name}",
                )
        self.prepare()
        try:
            template: str = self._hf.get_chat_template(tools=variables.get("tools"))
            return self._run(
                template,
                [_in_form(message, self._parts[template]) for message in messages],
                {"add_generation_prompt": add_generation_prompt, **variables},
            )
        except (TemplateFailed, ValueError) as error:
            raise InvalidRequestError(
                f"The chat template of this checkpoint does not take these messages: {error}",
                param="messages",
            ) from error
        except TemplateStopped as error:
            raise InvalidRequestError(
                f"The chat template of this checkpoint was stopped at these messages: {error}.",
                param="messages",
            ) from error

    def _run(self, template: str, messages: list[Any], variables: Mapping[str, Any]) -> str:
        renderer = self._renderer or shared_renderer()
        return renderer.render(template, messages, {**self._hf.special_tokens_map, **variables})

    def _reserved_names(self) -> set[str]:
        """Arguments of ``apply_chat_template`` that are no variables; one is the template."""
        arguments = inspect.signature(self._hf.apply_chat_template).parameters
        return set(arguments) - _ARGUMENTS_THAT_ARE_VARIABLES

    def _inspect(self, template: str, name: str) -> frozenset[str]:
        """Compile a template and try it; the roles whose contents it reads as parts."""
        try:
            (self._renderer or shared_renderer()).compile(template)
        except TemplateFailed as error:
            raise CheckpointError(
                f"the chat template {name!r} does not compile: {error}"
            ) from error
        except TemplateStopped as error:
            raise CheckpointError(f"chat template {name!r} cannot be used: {error}") from error
        if name not in _TRIAL_VARIABLES:
            return frozenset()  # transformers does not choose it by itself, so nor do we
        try:
            roles, shows_users = roles_of_parts(
                lambda messages: self._try(template, messages, _TRIAL_VARIABLES[name])
            )
        except TemplateStopped as error:
            logger.warning("The chat template %r was stopped when it was tried: %s.", name, error)
            return frozenset()
        if not shows_users:
            logger.warning(
                "The chat template %r does not show what the user says, neither as a text nor as a "
                "list of parts: the model will not see it.",
                name,
            )
        return roles

    def _try(
        self, template: str, messages: list[Message], variables: Mapping[str, Any]
    ) -> str | None:
        try:
            return self._run(template, messages, {"add_generation_prompt": True, **variables})
        except TemplateFailed:
            return None


def roles_of_parts(
    render: Callable[[list[Message]], str | None],
) -> tuple[frozenset[str], bool]:
    """The roles whose contents a template reads as lists of parts, and whether it shows users'.

    Texts are preferred: of all choices, the first is taken that shows most users' texts, and then
    most texts. Roles that are not tried go with the user.

    Args:
        render: a conversation to a text; None where the template refuses it.
    """

    @cache
    def shown_in(trial: tuple[str, ...], roles: frozenset[str]) -> list[str]:
        return _shown(render, trial, roles)

    best: tuple[int, int] = (-1, -1)
    chosen: frozenset[str] = frozenset()
    for forms in itertools.product((False, True), repeat=len(_ROLES)):
        roles = frozenset(itertools.compress(_ROLES, forms))
        shown = [role for trial in _TRIALS for role in shown_in(trial, roles.intersection(trial))]
        score = shown.count("user"), len(shown)
        if score > best:
            best, chosen = score, roles
    return chosen, best[0] > 0


def _shown(
    render: Callable[[list[Message]], str | None], trial: tuple[str, ...], roles: frozenset[str]
) -> list[str]:
    """The roles of a conversation whose contents are in its text, as they are."""
    words = [f"zq{i}probe{i}qz" for i in range(len(trial))]
    messages = [
        _in_form({"role": role, "content": word}, roles)
        for role, word in zip(trial, words, strict=True)
    ]
    text = (render(messages) or "").lower()
    return [role for role, word in zip(trial, words, strict=True) if _is_plain(word, text)]


def _is_plain(word: str, text: str) -> bool:
    """Whether a text has the word, and not the list of parts around it, printed as it is."""
    return word in text and not re.search(rf"""['"]text['"]\s*:\s*['"]{word}""", text)


def _in_form(message: Any, roles_of_parts: frozenset[str]) -> Any:
    """A message with its content in the form that the template reads."""
    if not isinstance(message, Mapping):
        return message
    content: Any = message.get("content")
    role = message.get("role")
    wants_parts = (role if role in _ROLES else "user") in roles_of_parts
    if wants_parts and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if not wants_parts and _is_list_of_texts(content):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return message


def _is_list_of_texts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    )


def _named_templates(templates: object) -> dict[str, str]:
    """Template by name; a single one is the default.

    Raises:
        CheckpointError: one of them is no text.
    """
    named: dict[str, Any] = templates if isinstance(templates, dict) else {"default": templates}
    for name, template in named.items():
        if not isinstance(template, str):
            raise CheckpointError(
                f"chat template {name!r} is of type {type(template).__name__}: it must be a text."
            )
    return named
