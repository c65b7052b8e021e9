"""The bodies of replies. Generations are written as plain dicts in their form (``formats.py``)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

__all__ = [
    "ChatCompletionResponse",
    "CompletionResponse",
    "DetokenizeResponse",
    "ErrorResponse",
    "ExitsResponse",
    "GenerateResponse",
    "ModelResponse",
    "ModelsResponse",
    "StatusResponse",
    "TokenizeResponse",
    "VersionResponse",
]


class PromptTokensDetails(BaseModel):
    """What of the prompt came from the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts of the whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class BudgetReport(BaseModel):
    """What became of the budget. Times in milliseconds."""

    exit_layer: int
    tokens_by_exit: dict[str, int]
    compute: float
    degraded: bool
    predicted_ms: float | None
    predicted_ttft_ms: float | None
    predicted_tpot_ms: float | None
    actual_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    met: bool | None


class _Choice(BaseModel):
    index: int
    finish_reason: str
    logprobs: Any = None
    token_ids: list[int] | None = None
    budget: BudgetReport | None = None


class TextChoice(_Choice):
    """One answer."""

    text: str


class CalledFunction(BaseModel):
    """A function and what it is given."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(BaseModel):
    """A call of a tool that the client offered."""

    id: str
    type: str
    function: CalledFunction


class Message(BaseModel):
    """The assistant's turn."""

    role: str
    content: str | None
    """Null where there are calls of tools and no text."""
    tool_calls: list[ToolCall] | None = None


class MessageChoice(_Choice):
    """One answer."""

    message: Message


class _GenerationResponse(BaseModel):
    id: str
    model: str
    service_tier: str | None = None
    usage: Usage
    budget: BudgetReport | None = None


class GenerateResponse(_GenerationResponse):
    """Reply of `POST /generate`."""

    choices: list[TextChoice]


class CompletionResponse(_GenerationResponse):
    """Reply of `POST /v1/completions`."""

    object: str
    created: int
    choices: list[TextChoice]


class ChatCompletionResponse(_GenerationResponse):
    """Reply of `POST /v1/chat/completions`."""

    object: str
    created: int
    choices: list[MessageChoice]


class ModelResponse(BaseModel):
    """One name that the server answers to."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    max_model_len: int
    exit_layer: int | None
    exits: list[int]
    license: str | None


class ModelsResponse(BaseModel):
    """Reply of `GET /v1/models`."""

    object: str
    data: list[ModelResponse]


class ExitEstimate(BaseModel):
    """What a typical request would take now, in milliseconds."""

    ttft_ms: float
    tpot_ms: float
    latency_ms: float


class ExitEntry(BaseModel):
    """One sub-model."""

    exit_layer: int
    model: str
    num_parameters: int
    compute: float
    quality: dict[str, float] | None
    score: float | None
    usable: bool | None
    served_unasked: bool
    estimate: ExitEstimate | None


class ScheduleEntry(BaseModel):
    """One depth schedule that was measured; `compute` is the mean over `max_tokens`."""

    schedule: list[list[int]]
    compute: float
    quality: dict[str, float] | None
    score: float | None
    estimate: ExitEstimate | None


class EstimateFor(BaseModel):
    """The request that the estimates are for."""

    prompt_tokens: int
    max_tokens: int


class ExitsResponse(BaseModel):
    """Reply of `GET /exits`."""

    exits: list[ExitEntry]
    schedules: list[ScheduleEntry]
    estimate_for: EstimateFor
    min_quality: float


class TokenizeResponse(BaseModel):
    """Reply of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """Reply of `POST /detokenize`."""

    prompt: str


class TokenizerInfoResponse(BaseModel):
    """Reply of `GET /tokenizer_info`."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    additional_special_tokens: list[str]
    chat_template: str | None
    """As the checkpoint has it (Jinja); null where it has none."""
    model_max_length: int
    """Most tokens of prompt and answer together."""


class StatusResponse(BaseModel):
    """Reply of the probes."""

    status: str
    replicas: dict[str, str] | None = None
    """The state of each engine by its name, where they are not in this process."""


class VersionResponse(BaseModel):
    """Reply of `GET /version`."""

    version: str
    backend: str | None = None
    """What the model computes with."""


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error, as OpenAI writes it."""

    error: ErrorDetails
