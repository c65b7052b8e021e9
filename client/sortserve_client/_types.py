"""What the server answers, as frozen values. Fields this version does not know are ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

__all__ = [
    "BudgetReport",
    "Choice",
    "ExitInfo",
    "Generation",
    "Health",
    "LatencyEstimate",
    "ModelInfo",
    "ScheduleInfo",
    "StreamEvent",
    "TokenLogprob",
    "Tokenization",
    "Usage",
]

JSON = Mapping[str, Any]


class _Record:
    """A dataclass that can be made from a JSON object whose keys are its fields."""

    @classmethod
    def from_json(cls, values: JSON) -> Self:
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # subclasses are dataclasses
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request, over all its choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""

    @classmethod
    def from_json(cls, values: JSON) -> Usage:
        """Read the ``usage`` object."""
        details = values.get("prompt_tokens_details") or {}
        return cls(
            prompt_tokens=values.get("prompt_tokens", 0),
            completion_tokens=values.get("completion_tokens", 0),
            total_tokens=values.get("total_tokens", 0),
            cached_tokens=details.get("cached_tokens") or 0,
        )


@dataclass(frozen=True, kw_only=True)
class BudgetReport:
    """What the budget became: depth used, times predicted, times taken (milliseconds)."""

    exit_layer: int | None = None
    """The exit in use at the end."""
    tokens_by_exit: Mapping[int, int] = field(default_factory=dict)
    compute: float | None = None
    """Mean share of the full model's FLOPs per output token."""
    degraded: bool | None = None
    """Whether the server made a token shallower than the deepest exit that the budget allows."""
    predicted_ms: float | None = None
    predicted_ttft_ms: float | None = None
    predicted_tpot_ms: float | None = None
    actual_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    """None below two output tokens."""
    met: bool | None = None
    """Whether every time of the budget was kept; None if it bounds no time."""

    @classmethod
    def from_json(cls, values: JSON) -> BudgetReport:
        """Read a ``budget`` object of a reply."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        by_exit = values.get("tokens_by_exit") or {}
        known["tokens_by_exit"] = {int(exit_): count for exit_, count in by_exit.items()}
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One token with its natural-log probability and, on request, its rivals."""

    token: str
    logprob: float
    token_id: int | None = None
    bytes: tuple[int, ...] | None = None
    """UTF-8 bytes of the token: it may be less than a character."""
    top_logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def from_json(cls, values: JSON) -> TokenLogprob:
        """Read one entry of ``logprobs``."""
        raw_bytes = values.get("bytes")
        return cls(
            token=values["token"],
            logprob=values["logprob"],
            token_id=values.get("token_id"),
            bytes=None if raw_bytes is None else tuple(raw_bytes),
            top_logprobs=logprobs_from_json(values.get("top_logprobs")) or (),
        )


def logprobs_from_json(values: JSON | Sequence[JSON] | None) -> tuple[TokenLogprob, ...] | None:
    """Read ``logprobs``: a list of entries, or an object that holds the list as ``content``."""
    if values is None:
        return None
    entries = values.get("content") or () if isinstance(values, Mapping) else values
    return tuple(TokenLogprob.from_json(entry) for entry in entries)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of the ``n`` answers."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    """``stop``, ``length``, ``deadline`` or ``abort``; None while a stream runs."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    """Set if ``return_token_ids`` was."""
    budget: BudgetReport | None = None

    @classmethod
    def from_json(cls, values: JSON) -> Choice:
        """Read one entry of ``choices``."""
        token_ids = values.get("token_ids")
        return cls(
            index=values.get("index", 0),
            text=values.get("text") or "",
            finish_reason=values.get("finish_reason"),
            logprobs=logprobs_from_json(values.get("logprobs")),
            token_ids=None if token_ids is None else tuple(token_ids),
            budget=budget_from_json(values.get("budget")),
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A whole answer."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage = field(default_factory=Usage)
    budget: BudgetReport = field(default_factory=BudgetReport)
    """Of all choices together; each choice has its own too."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason if self.choices else None

    @classmethod
    def from_json(cls, values: JSON) -> Generation:
        """Read the reply of ``POST /generate``."""
        return cls(
            id=values["id"],
            model=values.get("model", ""),
            choices=tuple(Choice.from_json(choice) for choice in values["choices"]),
            usage=usage_from_json(values.get("usage")) or Usage(),
            budget=budget_from_json(values.get("budget")) or BudgetReport(),
        )


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """What one event of a stream added to one choice."""

    text: str = ""
    index: int = 0
    """Which of the ``n`` choices."""
    exit_layer: int | None = None
    """The exit that made the token of this event."""
    finish_reason: str | None = None
    """Set on the last event of a choice."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    budget: BudgetReport | None = None
    """Set once the outcome is known."""
    usage: Usage | None = None
    """Set on the last event that has one."""


@dataclass(frozen=True, kw_only=True)
class LatencyEstimate(_Record):
    """What a typical request would take at one exit now, in milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class ExitInfo:
    """One sub-model of the served checkpoint."""

    exit_layer: int
    model: str | None = None
    """The name that asks for this exit, ``NAME@E``."""
    num_parameters: int | None = None
    compute: float | None = None
    """FLOPs per token relative to the full model; in (0, 1]."""
    score: float | None = None
    """Measured quality relative to the full model; None where it was not measured."""
    quality: Mapping[str, float] | None = None
    """The metrics behind the score."""
    usable: bool | None = None
    """Whether the evaluation found its answers fit to be read; None: nobody judged."""
    served_unasked: bool | None = None
    """Whether requests get it that name neither an exit nor a floor."""
    estimate: LatencyEstimate | None = None

    @classmethod
    def from_json(cls, values: JSON) -> ExitInfo:
        """Read one entry of ``GET /exits``."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        estimate = values.get("estimate")
        known["estimate"] = None if estimate is None else LatencyEstimate.from_json(estimate)
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class ScheduleInfo:
    """One depth schedule that the evaluation of the served checkpoint measured."""

    schedule: tuple[tuple[int, int], ...]
    """Pairs (k, E): from output token k on, exit E."""
    compute: float | None = None
    """Mean FLOPs per token relative to the full model, of a typical answer; in (0, 1]."""
    score: float | None = None
    """Measured quality relative to the full model."""
    quality: Mapping[str, float] | None = None
    """The metrics behind the score."""
    estimate: LatencyEstimate | None = None

    @classmethod
    def from_json(cls, values: JSON) -> ScheduleInfo:
        """Read one entry of ``schedules`` of ``GET /exits``."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        estimate = values.get("estimate")
        known["schedule"] = tuple((k, exit_layer) for k, exit_layer in values["schedule"])
        known["estimate"] = None if estimate is None else LatencyEstimate.from_json(estimate)
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether the server takes requests. True in a condition means ready."""

    ready: bool
    state: str
    """Such as ``loading``, ``ready`` or ``draining``."""

    def __bool__(self) -> bool:
        return self.ready


@dataclass(frozen=True, kw_only=True)
class ModelInfo(_Record):
    """One name that the server answers to; ``NAME@E`` is exit E."""

    id: str
    max_model_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """A prompt as token ids."""

    tokens: tuple[int, ...]
    max_model_len: int | None = None

    @property
    def count(self) -> int:
        """How many tokens the prompt has."""
        return len(self.tokens)

    @classmethod
    def from_json(cls, values: JSON) -> Tokenization:
        """Read the reply of ``POST /tokenize``."""
        return cls(tokens=tuple(values["tokens"]), max_model_len=values.get("max_model_len"))


def budget_from_json(values: JSON | None) -> BudgetReport | None:
    """Read an optional ``budget`` object."""
    return None if values is None else BudgetReport.from_json(values)


def usage_from_json(values: JSON | None) -> Usage | None:
    """Read an optional ``usage`` object."""
    return None if values is None else Usage.from_json(values)
