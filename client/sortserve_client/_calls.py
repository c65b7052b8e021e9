"""Every route as a value: what to send and how to read the answer. Nothing here does I/O.

The sync and the async client differ only in how they carry a ``Call`` out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

import httpx

from sortserve_client._budget import Budget
from sortserve_client._types import (
    ExitInfo,
    Generation,
    Health,
    ModelInfo,
    ScheduleInfo,
    Tokenization,
)

__all__ = [
    "Call",
    "Messages",
    "Prompt",
    "SamplingOptions",
    "detokenize",
    "exits",
    "generate",
    "health",
    "metrics",
    "models",
    "tokenize",
    "version",
]

T = TypeVar("T")

Prompt = str | Sequence[int]
"""Text, or token ids."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation: ``[{"role": "user", "content": "..."}]``."""


class SamplingOptions(TypedDict, total=False):
    """Keywords of ``generate`` and ``stream``. One left out, or None, is the server's default."""

    model: str | None
    """A served name, or ``NAME@E`` for exit E."""
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    """0 takes the most likely token."""
    top_p: float | None
    top_k: int | None
    min_p: float | None
    stop: str | Sequence[str] | None
    """The answer ends before the first of these texts."""
    include_stop_str_in_output: bool | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    seed: int | None
    n: int | None
    """How many answers."""
    add_special_tokens: bool | None
    """Begin a text prompt with the tokenizer's special tokens."""
    add_generation_prompt: bool | None
    """End messages with the start of an answer."""
    chat_template_kwargs: Mapping[str, Any] | None
    skip_special_tokens: bool | None
    """Leave special tokens out of the text."""
    return_token_ids: bool | None
    logprobs: int | None
    """Log probabilities of each token and of this many rivals."""
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    format: Mapping[str, Any] | None
    """What the answer must look like: ``{"json": schema}``, ``{"regex": ...}``,
    ``{"choice": [...]}``, ``{"grammar": ...}``, or OpenAI's ``response_format``."""
    logit_bias: Mapping[int, float] | None
    """Token id to a number added to its logit."""
    priority: int | None
    """Lower is earlier, and worth more beside others; -100 to 100."""
    service_tier: str | None
    """``flex``, ``default`` or ``priority``: what the request is worth."""
    request_id: str | None
    cache_salt: str | None
    """Cached prefixes are shared only between requests of equal salt."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and the reading of its answer."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    body: Mapping[str, Any] | None = None
    retry: bool = True
    answers: frozenset[int] = frozenset({200})
    """Statuses that ``parse`` reads; every other one is an error."""


def generate(
    prompt: Prompt | None,
    messages: Messages | None,
    budget: Budget | None,
    extra: Mapping[str, Any] | None,
    options: Mapping[str, object],
    *,
    stream: bool = False,
) -> Call[Generation]:
    """``POST /generate``.

    Raises:
        ValueError: not exactly one of prompt and messages.
        TypeError: an option that does not exist; ``extra`` sends any field.
    """
    if (prompt is None) == (messages is None):
        raise ValueError("Give either a prompt or messages, exactly one of the two.")
    for name in options:
        if name not in SamplingOptions.__annotations__:
            known = ", ".join(SamplingOptions.__annotations__)
            raise TypeError(
                f"{name!r} is not an option; choose from {known}, or send it with extra."
            )
    body: dict[str, Any] = {"stream": True} if stream else {}
    if messages is not None:
        body["messages"] = [dict(message) for message in messages]
    else:
        body["prompt"] = _plain(prompt)
    if budget is not None:
        body["budget"] = budget.to_json()
    body.update({name: _plain(value) for name, value in options.items() if value is not None})
    body.update(extra or {})
    return Call("POST", "/generate", lambda reply: Generation.from_json(reply.json()), body)


def tokenize(
    prompt: str | None, messages: Messages | None, add_special_tokens: bool
) -> Call[Tokenization]:
    """``POST /tokenize``."""
    if (prompt is None) == (messages is None):
        raise ValueError("Give either a prompt or messages, exactly one of the two.")
    body: dict[str, Any] = {"add_special_tokens": add_special_tokens}
    if messages is not None:
        body = {"messages": [dict(message) for message in messages]}
    else:
        body["prompt"] = prompt
    return Call("POST", "/tokenize", lambda reply: Tokenization.from_json(reply.json()), body)


def detokenize(tokens: Sequence[int]) -> Call[str]:
    """``POST /detokenize``."""
    body = {"tokens": list(tokens)}
    return Call("POST", "/detokenize", lambda reply: str(reply.json()["prompt"]), body)


def exits() -> Call[list[ExitInfo]]:
    """``GET /exits``."""
    return Call("GET", "/exits", lambda r: [ExitInfo.from_json(e) for e in r.json()["exits"]])


def schedules() -> Call[list[ScheduleInfo]]:
    """``GET /exits``, of a server that knows no schedules too."""

    def read(response: httpx.Response) -> list[ScheduleInfo]:
        return [ScheduleInfo.from_json(entry) for entry in response.json().get("schedules", ())]

    return Call("GET", "/exits", read)


def models() -> Call[list[ModelInfo]]:
    """``GET /v1/models``."""
    return Call("GET", "/v1/models", lambda r: [ModelInfo.from_json(m) for m in r.json()["data"]])


def health() -> Call[Health]:
    """``GET /health``: 503 is an answer, so it is neither retried nor an error."""
    return Call("GET", "/health", _read_health, retry=False, answers=frozenset({200, 503}))


def version() -> Call[str]:
    """``GET /version``."""
    return Call("GET", "/version", lambda reply: str(reply.json()["version"]))


def metrics() -> Call[str]:
    """``GET /metrics``."""
    return Call("GET", "/metrics", lambda reply: reply.text)


def _read_health(reply: httpx.Response) -> Health:
    ready = reply.status_code == 200
    try:
        state = reply.json().get("status")
    except (ValueError, AttributeError):  # a proxy in between may answer with a page of its own
        state = None
    return Health(ready=ready, state=state or ("ready" if ready else "unavailable"))


def _plain(value: Any) -> Any:
    """Sequences and mappings of any type as the lists and dicts that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return value
