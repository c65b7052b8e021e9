"""How the next token is chosen: one frozen, validated value per request (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from sortserve.core.errors import InvalidRequestError, shortened
from sortserve.core.formats import read_format
from sortserve.core.grammar import Constraint, OutputFormat
from sortserve.core.ranges import Range, integers, numbers

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
        return shortened(value)
    except ValueError:  # such an integer in a list
        return f"(a {type(value).__name__})"


_TOKEN_ID = integers(0, MAX_INT)
LOGIT_BIAS = numbers(-100, 100)
RANGES = {
    "max_tokens": integers(1, MAX_INT),
    "min_tokens": integers(0, MAX_INT),  # and no more than max_tokens
    "top_k": replace(integers(-1, MAX_INT), allowed=f"an integer from -1 or 0 (off) to {MAX_INT}"),
    "seed": integers(-MAX_SEED - 1, MAX_SEED),
    "logprobs": integers(0, MAX_LOGPROBS),
    "temperature": numbers(0, 100),
    "top_p": numbers(0, 1),
    "min_p": numbers(0, 1),
    "repetition_penalty": Range(
        least=0, most=100, without_least=True, allowed="a number above 0, to 100"
    ),
    "presence_penalty": numbers(-2, 2),
    "frequency_penalty": numbers(-2, 2),
}
"""What the numbers of ``SamplingParams`` may be."""
_OPTIONAL = ("seed", "logprobs")


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
    format: OutputFormat | Mapping[str, Any] | None = None
    """What the answer must look like: ``{"json": schema}``, ``{"regex": ...}``,
    ``{"choice": [...]}``, ``{"grammar": ...}`` or OpenAI's ``response_format``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", read_format(self.format, "format"))
        self._check("max_tokens", RANGES["max_tokens"])
        allowed = f"an integer from 0 to max_tokens={self.max_tokens}"
        self._check("min_tokens", replace(integers(0, self.max_tokens), allowed=allowed))
        for name, range_ in RANGES.items():
            if not (name in _OPTIONAL and getattr(self, name) is None):
                self._check(name, range_)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, "true or false")
        self._check_collections()

    def _check(self, name: str, range_: Range) -> None:
        value = getattr(self, name)
        _require(value in range_, name, value, range_.allowed)

    def _check_collections(self) -> None:
        allowed = f"token ids >= 0, each with a bias from {LOGIT_BIAS.least} to {LOGIT_BIAS.most}"
        _require(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, allowed)
        for token_id, bias in self.logit_bias.items():
            ok = token_id in _TOKEN_ID and bias in LOGIT_BIAS
            param = f"logit_bias.{token_id if isinstance(token_id, str) else _shown(token_id)}"
            _require(ok, param[:_MAX_SHOWN_CHARS], bias, allowed)
        allowed = f"at most {MAX_STOP_STRINGS} non-empty strings"
        are_strings = isinstance(self.stop, tuple | list) and len(self.stop) <= MAX_STOP_STRINGS
        are_strings = are_strings and all(isinstance(text, str) and text for text in self.stop)
        _require(are_strings, "stop", self.stop, allowed)
        ids = self.stop_token_ids
        _require(isinstance(ids, tuple | list), "stop_token_ids", ids, "a list of token ids")
        for i, token_id in enumerate(ids):
            _require(token_id in _TOKEN_ID, f"stop_token_ids.{i}", token_id, "a token id >= 0")

    @property
    def output_format(self) -> OutputFormat | None:
        """``format`` as it was read; None: anything."""
        assert not isinstance(self.format, Mapping)
        return self.format

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


class _Counted(Sequence[int]):
    """Tokens whose last one is not known: all may be counted, and the others read."""

    def __init__(self, tokens: Sequence[int], count: int) -> None:
        assert count == len(tokens) + 1, "one token is on its way at most"
        self._tokens, self._count = tokens, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        wanted = range(self._count)[index]
        places = [wanted] if isinstance(wanted, int) else wanted
        assert max(places, default=-1) < self._count - 1, "this token is not known yet"
        known = [self._tokens[place] for place in places]
        return known[0] if isinstance(wanted, int) else known


@dataclass(frozen=True, eq=False)
class SamplingRow:
    """What the sampler needs to know of one row: plain values, nothing of the batch around it.

    Two are the same only if they are one object: a request keeps its own for as long as it lives,
    and ``output_token_ids`` may grow meanwhile, but only at its end.
    """

    params: SamplingParams
    seed: int
    """The request's seed (drawn by the engine if the client gave none)."""
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Tokens generated so far; their number is the position that the noise is drawn from."""
    stop_token_ids: frozenset[int]
    """Every id that ends this request (EOS included unless ignored): masked below min_tokens."""
    constraint: Constraint | None = None
    """What the answer must look like; None: anything."""

    @property
    def needs_history(self) -> bool:
        """Whether the next token depends on the values of those generated so far, in the sampler.

        Their number is all that other rows need.
        """
        return self.constraint is not None or self.params.has_penalties

    def at(self, num_output_tokens: int | None) -> SamplingRow:
        """The row when so many tokens are out, of which the last may not be known here.

        Args:
            num_output_tokens: as many as are known, or one more; None: as many as are known.
        """
        if num_output_tokens is None or num_output_tokens == len(self.output_token_ids):
            return self
        return replace(self, output_token_ids=_Counted(self.output_token_ids, num_output_tokens))


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
    """``exception``, ``non_finite`` (the model's scores were NaN or infinite), ``text`` or
    ``grammar``: a label of the metrics, so never a client's words."""
    detail: str = ""
    """What the client is told beside it."""
