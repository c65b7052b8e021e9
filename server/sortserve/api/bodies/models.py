"""The bodies of requests: names and types. Ranges belong to ``SamplingParams`` and ``Budget``.

Null means absent everywhere. Types are strict: ``"16"`` and ``true`` are no numbers. ``/generate``,
``/tokenize`` and ``/detokenize`` refuse unknown fields; the OpenAI routes tolerate them, as load
tools send fields that no server knows, but refuse the ones they know and cannot honour.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from sortserve.api.bodies import limits
from sortserve.api.http.middleware import REQUEST_ID_PATTERN
from sortserve.core import budget, sampling_params
from sortserve.core.budget import OnMiss
from sortserve.core.sampling_params import LOGIT_BIAS, MAX_SEED
from sortserve.core.schedule import SCHEDULE_SCHEMA

__all__ = [
    "ChatCompletionBody",
    "CompletionBody",
    "DetokenizeBody",
    "GenerateBody",
    "GenerationFields",
    "OpenAIFields",
    "StreamOptions",
    "TextOrObject",
    "TokenizeBody",
    "ranged",
]

# Every value that OpenAI's own client knows.
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"]
_BUDGET_WORDS = {
    "latency_ms": "Arrival to the last token.",
    "ttft_ms": "Arrival to the first token.",
    "tpot_ms": "Mean time per output token after the first.",
    "compute": "Largest share of the full model's FLOPs a token.",
    "exit_layer": "Exactly this exit; see GET /exits.",
    "min_exit_layer": "No exit shallower than this.",
    "min_quality": "No exit with a lower score; 0 lifts the server's own floor.",
}
_BUDGET_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "description": "What the request may cost. Every field is optional.",
    "properties": {
        **{
            name: {**budget.RANGES[name].json_schema, "description": words}
            for name, words in _BUDGET_WORDS.items()
        },
        "schedule": {
            **SCHEDULE_SCHEMA,
            "description": "Pairs [k, E]: from output token k on, exit E, never deeper.",
        },
        "on_miss": {
            "enum": [choice.value for choice in OnMiss],
            "default": OnMiss.DEGRADE.value,
            "description": "What to do when no allowed exit fits the times.",
        },
    },
    "example": {"latency_ms": 800, "min_quality": 0.9},
}
_FORMAT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "example": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
}
_QUESTION = [{"role": "user", "content": "What is gravity?"}]
_SHORT = {"max_tokens": 48, "temperature": 0, "budget": {"latency_ms": 2000}}
_LOGIT_BIAS_SCHEMA = {"type": "object", "additionalProperties": LOGIT_BIAS.json_schema}
_NONE_OR_MORE = sampling_params.RANGES["max_tokens"].json_schema | {"minimum": 0}
_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}}
_ONE_PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, _TOKEN_IDS], "example": "Once upon a time"}
_PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS},
    ],
    "example": "Once upon a time",
}
_MESSAGES_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    },
    "example": [{"role": "user", "content": "Say hello."}],
}


def _as_list(value: object) -> object:
    """One stop string as a list of one."""
    return [value] if isinstance(value, str) else value


def _example(body: dict[str, Any]) -> ConfigDict:
    """What a page fills in for the reader: one that was made of the fields would name them all."""
    return ConfigDict(json_schema_extra={"example": body})


def ranged(name: str) -> WithJsonSchema:
    """The range that ``SamplingParams`` checks, in the document."""
    return WithJsonSchema(sampling_params.RANGES[name].json_schema)


# One error is enough: a body may hold thousands of wrong items.
Name = Annotated[str, Field(max_length=limits.MAX_NAME_CHARS)]
StopString = Annotated[str, Field(max_length=limits.MAX_STOP_CHARS)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=limits.MAX_STOP_STRINGS, fail_fast=True),
    BeforeValidator(_as_list),
]
TokenIds = Annotated[list[int], Field(max_length=limits.MAX_STOP_TOKEN_IDS, fail_fast=True)]
LogitBias = Annotated[
    dict[str, Any],
    Field(max_length=limits.MAX_LOGIT_BIAS),
    WithJsonSchema(_LOGIT_BIAS_SCHEMA),
]
FormatObject = Annotated[
    dict[str, Any], Field(max_length=limits.MAX_FORMAT_FIELDS), WithJsonSchema(_FORMAT_SCHEMA)
]
# Checked by who reads it: pydantic names a field by its place in a union, which no client wrote.
TextOrObject = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]})
]
RequestId = Annotated[str, Field(pattern=f"^{REQUEST_ID_PATTERN}$")]
BudgetObject = Annotated[
    dict[str, Any], Field(max_length=limits.MAX_BUDGET_FIELDS), WithJsonSchema(_BUDGET_SCHEMA)
]
Messages = Annotated[
    list[Any], Field(max_length=limits.MAX_MESSAGES), WithJsonSchema(_MESSAGES_SCHEMA)
]
TemplateVariables = Annotated[dict[str, Any], Field(max_length=limits.MAX_TEMPLATE_VARIABLES)]


class _Body(BaseModel):
    model_config = ConfigDict(
        strict=True,
        allow_inf_nan=False,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class StreamOptions(_Body):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None
    """Send the usage at the end."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far with every event."""


class GenerationFields(_Body):
    """The fields that all three generation routes share."""

    model: Name | None = None
    """The served name, or `NAME@E` for exit E. Default: the served name."""
    max_tokens: Annotated[int, ranged("max_tokens")] | None = None
    """Most tokens to generate. Default: what fits the context; 16 on `/v1/completions`."""
    min_tokens: Annotated[int, ranged("min_tokens")] | None = None
    """The answer does not end by itself before this many tokens."""
    temperature: Annotated[float, ranged("temperature")] | None = None
    """0 is greedy."""
    top_p: Annotated[float, ranged("top_p")] | None = None
    top_k: Annotated[int, ranged("top_k")] | None = None
    """0 or -1 keeps every token."""
    min_p: Annotated[float, ranged("min_p")] | None = None
    repetition_penalty: Annotated[float, ranged("repetition_penalty")] | None = None
    """Over prompt and output, as in Hugging Face."""
    presence_penalty: Annotated[float, ranged("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, ranged("frequency_penalty")] | None = None
    logit_bias: LogitBias | None = None
    """Token id to a bias from -100 to 100; at most 1024."""
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, lt=MAX_SEED + 1)] | None = None
    """Makes the sample repeatable, whatever else the server does."""
    stop: StopStrings | None = None
    """The answer ends before the first of these texts: a string, or at most 16."""
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    """How many answers for each prompt."""
    stream: bool | None = None
    """Answer as server-sent events, one per token."""
    stream_options: StreamOptions | None = None
    budget: BudgetObject | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    """Lower is earlier, and worth more beside others. Default: 0."""
    service_tier: ServiceTier | None = None
    """What the request is worth: `flex`, `default` or `priority`; all others count as `default`.
    The reply names the tier that was used."""
    request_id: RequestId | None = None
    """Becomes part of the reply's id and of the server's logs."""
    cache_salt: Name | None = None
    """Cached prefixes are shared only between requests of equal salt."""
    return_token_ids: bool | None = None
    """Add `token_ids` to each choice."""


class GenerateBody(GenerationFields):
    """Body of `POST /generate`."""

    model_config = _example({"messages": _QUESTION, **_SHORT})

    format: FormatObject | None = None
    """What the answer must look like: one of `json` (a schema), `regex`, `choice`, `grammar`, or
    OpenAI's `response_format`."""

    prompt: Annotated[Any, WithJsonSchema(_ONE_PROMPT_SCHEMA)] = None
    """Text or token ids. Give this or `messages`."""
    messages: Messages | None = None
    """A conversation, put through the model's chat template."""
    logprobs: Annotated[int, ranged("logprobs")] | None = None
    """Log probabilities of each token and of this many rivals, 0 to 20."""
    add_special_tokens: bool | None = None
    """Begin a text prompt with the tokenizer's special tokens. Default: true."""
    add_generation_prompt: bool | None = None
    """End messages with the start of an answer. Default: true."""
    chat_template_kwargs: TemplateVariables | None = None


class OpenAIFields(GenerationFields):
    """And those that all OpenAI routes share."""

    model_config = ConfigDict(extra="allow")

    user: str | None = None
    """Accepted for compatibility; not used."""
    response_format: FormatObject | None = None
    """`{"type": "json_schema", "json_schema": {"name", "schema"}}`, `{"type": "json_object"}` or
    `{"type": "text"}`."""
    structured_outputs: FormatObject | None = None
    """vLLM's: one of `json` (a schema), `regex`, `choice`, `grammar`."""
    guided_json: TextOrObject = None
    """vLLM's older name of `structured_outputs.json`; likewise the three below."""
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionBody(OpenAIFields):
    """Body of `POST /v1/completions`."""

    model_config = _example({"prompt": "Once upon a time", **_SHORT})

    prompt: Annotated[Any, WithJsonSchema(_PROMPTS_SCHEMA)] = None
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    logprobs: Annotated[int, ranged("logprobs")] | None = None
    """Log probabilities of each token and of this many rivals, 0 to 20."""
    max_tokens: Annotated[int, WithJsonSchema(_NONE_OR_MORE)] | None = None
    """Most tokens to generate; default: 16. With `echo` none at all is allowed."""
    echo: bool | None = None
    """Begin each answer with its prompt; with `logprobs`, tell those of the prompt too."""
    best_of: int | None = None
    """Only the value of `n`."""
    suffix: str | None = None
    """Not supported."""
    add_special_tokens: bool | None = None


class ChatCompletionBody(OpenAIFields):
    """Body of `POST /v1/chat/completions`."""

    model_config = _example({"messages": _QUESTION, **_SHORT})

    messages: Messages
    """The conversation. Content is a text, or a list of parts of type `text`."""
    max_completion_tokens: Annotated[int, ranged("max_tokens")] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Send the log probability of each token."""
    top_logprobs: Annotated[int, ranged("logprobs")] | None = None
    """And of this many rivals, 0 to 20. Needs `logprobs`."""
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Annotated[list[Any], Field(max_length=limits.MAX_TOOLS)] | None = None
    """Functions that the model may call, as OpenAI has them."""
    tool_choice: TextOrObject = None
    """`none`, `auto`, `required`, `{"type": "function", "function": {"name"}}` or
    `{"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}`."""
    parallel_tool_calls: bool | None = None
    """False: one call at most in an answer that must have one."""


class TokenizeBody(_Body):
    """Body of `POST /tokenize`."""

    model_config = _example({"prompt": "What is gravity?"})

    model: Name | None = None
    prompt: str | None = None
    """Text. Give this or `messages`."""
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool | None = None
    """Add `token_strs`: each token as text."""


class DetokenizeBody(_Body):
    """Body of `POST /detokenize`."""

    model_config = _example({"tokens": [1, 2, 3]})

    model: Name | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]
    skip_special_tokens: bool | None = None
    """Leave special tokens out. Default: false."""
