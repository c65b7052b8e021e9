"""The body of ``POST /v1/responses``: input items to a conversation, and what is not kept here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, WithJsonSchema

from sortserve.api.bodies import limits
from sortserve.api.bodies.input_items import messages_of
from sortserve.api.bodies.messages import not_allowed
from sortserve.api.bodies.models import OpenAIFields, TextOrObject, ranged
from sortserve.api.bodies.prompts import ChatPrompt, check_chars, read_messages
from sortserve.core.errors import InvalidRequestError
from sortserve.core.formats import read_kind, read_response_format
from sortserve.core.grammar import OutputFormat

__all__ = [
    "LOGPROBS",
    "ResponsesBody",
    "check_stateless",
    "read_input",
    "read_text_format",
    "reads_logprobs",
]

LOGPROBS = "message.output_text.logprobs"
"""What ``include`` says for log probabilities."""
_INPUT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}],
    "example": "Say hello.",
}
TextObject = Annotated[dict[str, Any], Field(max_length=limits.MAX_BUDGET_FIELDS)]


class ResponsesBody(OpenAIFields):
    """Body of `POST /v1/responses`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "input": "What is gravity?",
                "max_output_tokens": 48,
                "temperature": 0,
                "budget": {"latency_ms": 2000},
            }
        }
    )

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = None
    """A text, or a list of messages, of `function_call`s of earlier responses and of each's
    `function_call_output`."""
    instructions: str | None = None
    """Said before the input, as a system message."""
    max_output_tokens: Annotated[int, ranged("max_tokens")] | None = None
    """Most tokens to generate. Default: what fits the context."""
    text: TextObject | None = None
    """`{"format": ...}`: what the answer must look like. `{"type": "json_schema", "name",
    "schema"}`, `{"type": "json_object"}` or `{"type": "text"}`."""
    include: list[str] | None = None
    """`message.output_text.logprobs`. All else is of outputs that no response here has."""
    top_logprobs: Annotated[int, ranged("logprobs")] | None = None
    """And of this many rivals, 0 to 20."""
    tools: Annotated[list[Any], Field(max_length=limits.MAX_TOOLS)] | None = None
    """Functions that the model may call: `{"type": "function", "name", "parameters"}`."""
    tool_choice: TextOrObject = None
    """`none`, `auto`, `required`, `{"type": "function", "name"}` or
    `{"type": "allowed_tools", "mode", "tools"}`."""
    parallel_tool_calls: bool | None = None
    """False: one call at most in an answer that must have one."""
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    """Comes back in the reply; not used."""
    store: bool | None = None
    """Nothing is kept: only `false`. Default: false."""
    previous_response_id: str | None = None
    """Nothing is kept: send the conversation in `input`."""
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Field(max_length=limits.MAX_TEMPLATE_VARIABLES)
    ] = None


def check_stateless(body: ResponsesBody) -> None:
    """Refuse what would need a memory of earlier responses, and forms that are not served.

    Raises:
        InvalidRequestError: ``param`` names the field.
    """
    if body.store:
        raise _unsupported("store", "true", "this server keeps no responses; send store=false")
    if body.previous_response_id:
        raise _unsupported(
            "previous_response_id",
            repr(body.previous_response_id[:40]),
            "this server keeps no responses; send the whole conversation as input",
        )
    if body.max_tokens is not None:
        raise _unsupported("max_tokens", str(body.max_tokens), "use max_output_tokens")
    if body.n not in (None, 1):
        raise _unsupported("n", str(body.n), "a response has one answer")
    verbosity = (body.text or {}).get("verbosity")
    if verbosity not in (None, "medium"):
        raise _unsupported("text.verbosity", repr(verbosity)[:60], "leave it out")


def read_text_format(body: ResponsesBody) -> OutputFormat | None:
    """What the answer must look like; None: any text.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of what is wrong.
    """
    value = (body.text or {}).get("format")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise not_allowed("text.format", value, "an object with a type")
    if value.get("type") == "json_schema":  # what chat nests in another object lies open here
        return read_kind("json", value.get("schema"), "text.format.schema")
    return read_response_format(value, "text.format")


def reads_logprobs(body: ResponsesBody) -> int | None:
    """Rivals per token; None: nobody asks for log probabilities."""
    asked = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    return (body.top_logprobs or 0) if asked else None


def read_input(
    body: ResponsesBody, *, max_chars: int, template_arguments: Mapping[str, Any]
) -> ChatPrompt:
    """The conversation that the input is, after the instructions.

    Args:
        body: the request.
        max_chars: no longer text can fit.
        template_arguments: what the template is told besides the body's own variables.

    Raises:
        InvalidRequestError: ``param`` is the dotted path of what is wrong.
    """
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    if not isinstance(items, list) or not items:
        raise not_allowed("input", body.input, "a string, or a list of at least one item")
    if len(items) > limits.MAX_MESSAGES:
        raise InvalidRequestError(
            f"input has {len(items)} items; {limits.MAX_MESSAGES} are allowed.", param="input"
        )
    messages, places = messages_of(items, "input")
    prompt = read_messages(
        messages,
        max_chars=max_chars,
        add_generation_prompt=True,
        template_arguments={**(body.chat_template_kwargs or {}), **template_arguments},
        name="input",
        places=places,
    )
    if not body.instructions:
        return prompt
    said = {"role": "system", "content": body.instructions}
    prompt = replace(prompt, messages=[said, *prompt.messages])
    check_chars(prompt.num_chars, "input", max_chars)
    return prompt


def _unsupported(param: str, value: str, instead: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}={value} is not supported by this server: {instead}.",
        param=param,
        code="unsupported_field",
    )
