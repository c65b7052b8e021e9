"""How the next token is chosen: one frozen, validated value per request (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sortserve.core.errors import InvalidRequestError

__all__ = ["RowFailure", "SampledToken", "SamplingParams", "SamplingRow", "TokenLogprob"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_INT = 2**31 - 1
"""Of counts: more than any model's context or vocabulary."""
MAX_SEED = 2**63 - 1
_MAX_SHOWN_CHARS = 100


def _require(ok: bool, param: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequestError(
            f"{param}={_shown(value)} is not allowed: {allowed}.", param=param
        )


def _shown(value: object) -> str:
    """The value as an error message can carry it."""
    if isinstance(value, int) and abs(value) > 10**_MAX_SHOWN_CHARS:
        return (
            f"(an integer of {value.bit_length()} bits)"  # Python refuses to write very long ones
        )
    try:
        text = repr(value)
    except ValueError:  # such an integer in a list
        return f"(a {type(value).__name__})"
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object, least: float, most: float) -> bool:
    """Compares and converts nothing: an integer may be too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


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
    """0 keeps the likeliest token alone."""
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
    """64 bits, signed."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """None: no logprobs. k >= 0: the sampled token's and those of the k most likely tokens,
    from the model's distribution before penalties and temperature."""

    def __post_init__(self) -> None:
        self._check_int("max_tokens", 1, MAX_INT)
        self._check_int("min_tokens", 0, self.max_tokens, "0 to max_tokens=")
        self._check_int("top_k", -1, MAX_INT, "-1 or 0 (off) to ")
        if self.seed is not None:
            self._check_int("seed", -MAX_SEED - 1, MAX_SEED)
        if self.logprobs is not None:
            self._check_int("logprobs", 0, MAX_LOGPROBS)
        self._check_number("temperature", 0, 100)
        self._check_number("top_p", 0, 1)
        self._check_number("min_p", 0, 1)
        _require(
            _is_number(self.repetition_penalty, 0, 100) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "a number above 0, to 100",
        )
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, "true or false")
        self._check_collections()

    def _check_int(self, name: str, least: int, most: int, range_: str | None = None) -> None:
        value = getattr(self, name)
        allowed = f"an integer from {range_ or f'{least} to '}{most}"
        _require(_is_int(value, least, most), name, value, allowed)

    def _check_number(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        _require(_is_number(value, least, most), name, value, f"a number from {least} to {most}")

    def _check_collections(self) -> None:
        allowed = "token ids >= 0, each with a bias from -100 to 100"
        _require(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, allowed)
        for token_id, bias in self.logit_bias.items():
            ok = _is_int(token_id, 0, MAX_INT) and _is_number(bias, -100, 100)
            param = f"logit_bias.{token_id if isinstance(token_id, str) else _shown(token_id)}"
            _require(ok, param[:_MAX_SHOWN_CHARS], bias, allowed)
        allowed = f"at most {MAX_STOP_STRINGS} non-empty strings"
        are_strings = isinstance(self.stop, tuple | list) and len(self.stop) <= MAX_STOP_STRINGS
        are_strings = are_strings and all(isinstance(text, str) and text for text in self.stop)
        _require(are_strings, "stop", self.stop, allowed)
        ids = self.stop_token_ids
        _require(isinstance(ids, tuple | list), "stop_token_ids", ids, "a list of token ids")
        for i, token_id in enumerate(ids):
            _require(
                _is_int(token_id, 0, MAX_INT), f"stop_token_ids.{i}", token_id, "a token id >= 0"
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
