"""Fields of the OpenAI API and its dialects that this server knows and cannot honour.

Ignoring them would answer something else than was asked, so any value that asks for something is
refused by name. Fields not listed here, and not in the schemas, are tolerated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sortserve.api.problems import shortened
from sortserve.budget import Budget
from sortserve.errors import InvalidRequestError

__all__ = ["refuse_unsupported"]

_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (False,),  # of chat: the template writes them
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "priority": (0,),
}
"""Field name to the values that ask for nothing."""
_BUDGET_FIELDS = frozenset(f.name for f in fields(Budget))


def refuse_unsupported(body_fields: Mapping[str, Any]) -> None:
    """Refuse fields that would change the answer if we could honour them.

    Raises:
        InvalidRequestError: ``param`` is the field.
    """
    for name, value in body_fields.items():
        if value is None:
            continue
        if name in _BUDGET_FIELDS:
            raise InvalidRequestError(
                f'{name} belongs inside budget: send {{"budget": {{"{name}": ...}}}}.', param=name
            )
        harmless = _HARMLESS_VALUES.get(name)
        if harmless is not None and not any(value == other for other in harmless):
            raise InvalidRequestError(
                f"{name}={shortened(value)} is not supported by this server; leave it out.",
                param=name,
                code="unsupported_field",
            )
