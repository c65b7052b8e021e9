"""How the next token is chosen: one frozen, validated value per request (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sortserve.errors import InvalidRequestError

__all__ = ["RowFailure", "SampledToken", "SamplingParams", "SamplingRow", "TokenLogprob"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


def _require(ok: bool, param: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{param}={value!r} is not allowed: {allowed}.", param=param)


def _finite(value: float) -> bool:
    return math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling fields with the meaning OpenAI, Hugging Face and vLLM give them.

    Raises:
        InvalidRequestError: a value is out of range; ``param`` names the field.
    """

    max_tokens: int = 16
    """Most tokens to generate. At least 1."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are masked until this many tokens are out."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """As in Hugging Face: over prompt and output."""
    presence_penalty: float = 0.0
    """As in OpenAI: over the output."""
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """None: no logprobs. k >= 0: the sampled token's and those of the k most likely tokens,
    from the model's distribution before penalties and temperature."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"an integer from 0 to max_tokens={self.max_tokens}",
        )
        _require(
            _finite(self.temperature) and 0.0 <= self.temperature <= 100.0,
            "temperature",
            self.temperature,
            "a number from 0 to 100",
        )
        _require(0.0 <= self.top_p <= 1.0, "top_p", self.top_p, "a number in [0, 1]")
        _require(self.top_k >= -1, "top_k", self.top_k, "-1 or 0 (off), or a positive integer")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "a number in [0, 1]")
        _require(
            _finite(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            "a number in (0, 100]",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, name, value, "a number from -2 to 2")
        for token_id, bias in self.logit_bias.items():
            _require(
                token_id >= 0 and -100.0 <= bias <= 100.0,
                f"logit_bias.{token_id}",
                bias,
                "token ids >= 0 with a bias from -100 to 100",
            )
        _require(
            len(self.stop) <= MAX_STOP_STRINGS and all(self.stop),
            "stop",
            list(self.stop),
            f"at most {MAX_STOP_STRINGS} non-empty strings",
        )
        _require(
            all(token_id >= 0 for token_id in self.stop_token_ids),
            "stop_token_ids",
            list(self.stop_token_ids),
            "token ids >= 0",
        )
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"null, or an integer from 0 to {MAX_LOGPROBS}",
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class SamplingRow:
    """What the sampler needs to know of one row: plain values, nothing of the batch around it."""

    params: SamplingParams
    seed: int
    """The request's seed (drawn by the engine if the client gave none)."""
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Tokens generated so far; their number is the position that the noise is drawn from."""
    stop_token_ids: frozenset[int]
    """Every id that ends this request (EOS included unless ignored): masked below min_tokens."""


@dataclass(frozen=True)
class TokenLogprob:
    """One token and its natural-log probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class SampledToken:
    """One row's next token, with logprobs where the request asked for them."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    """The k most likely tokens, most likely first."""


@dataclass(frozen=True)
class RowFailure:
    """A row that gave no token: its request ends with an error, its neighbours go on."""

    reason: str
    """``exception``, ``non_finite`` (the model's scores were NaN or infinite) or ``text``: a label
    of the metrics, so never a client's words."""
    detail: str = ""
    """What the client is told beside it."""
