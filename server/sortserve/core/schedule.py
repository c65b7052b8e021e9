"""Depth that falls along an answer: from output token k on, exit E (no torch).

Output tokens count from 0. A schedule only ever goes shallower, so all keys and values that a later
token needs exist already, and each token is what its exit gives offline.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from sortserve.core.errors import InvalidRequestError, shortened

__all__ = [
    "MAX_PARTS",
    "MAX_TOKEN",
    "SCHEDULE_SCHEMA",
    "DepthSchedule",
    "ScheduleInfo",
    "mean_over_tokens",
    "read_schedule",
    "starting_exits",
]

MAX_PARTS = 64
"""Exits that one schedule may name."""
MAX_TOKEN = 2**31 - 1
"""The last output token that it may name."""
SCHEDULE_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_PARTS,
    "items": {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN},
    },
    "example": [[0, 30], [32, 27], [96, 24]],
}
"""A schedule in the OpenAPI document."""
_FORM = f"a list of 1 to {MAX_PARTS} pairs [k, E]: from output token k on, exit E"


@dataclass(frozen=True)
class DepthSchedule:
    """The exit of each output token: pairs (k, E), from output token k on, exit E.

    Raises:
        ValueError: these are no such pairs; the message says why.
    """

    parts: tuple[tuple[int, int], ...]
    """The first k is 0; k ascends and E descends, both strictly."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _checked(self.parts))

    @classmethod
    def of(cls, pairs: object) -> DepthSchedule:
        """A schedule from what a JSON document has in its place.

        Raises:
            ValueError: it is none; the message says why.
        """
        return cls(_checked(pairs))

    @classmethod
    def parse(cls, text: str) -> DepthSchedule:
        """A schedule as a command line has it: ``0:30,32:27,96:24``.

        Raises:
            ValueError: it is none; the message says why.
        """
        pairs = []
        for part in text.split(","):
            k, colon, exit_layer = (word.strip() for word in part.partition(":"))
            if not (colon and _is_decimal(k) and _is_decimal(exit_layer)):
                raise ValueError(
                    f"{shortened(part)} should be K:E, from output token K on, exit E; parts are "
                    "separated by commas, as in 0:30,32:27"
                )
            pairs.append((int(k), int(exit_layer)))
        return cls(tuple(pairs))

    def __str__(self) -> str:
        return ",".join(f"{k}:{exit_layer}" for k, exit_layer in self.parts)

    @property
    def document(self) -> list[list[int]]:
        """The pairs as JSON has them."""
        return [[k, exit_layer] for k, exit_layer in self.parts]

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits it names, ascending."""
        return tuple(exit_layer for _, exit_layer in reversed(self.parts))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(k for k, _ in self.parts)

    def exit_at(self, k: int) -> int:
        """The exit of output token k."""
        return self.parts[bisect_right(self._starts, k) - 1][1]

    def spans(self, num_tokens: int, start: int = 0) -> list[tuple[int, int, int]]:
        """(first token, the one after the last, exit) of the parts that an answer reaches.

        Args:
            num_tokens: of the whole answer.
            start: tokens before it do not count.
        """
        ends = (*self._starts[1:], num_tokens)
        spans = [
            (max(k, start), min(end, num_tokens), exit_layer)
            for (k, exit_layer), end in zip(self.parts, ends, strict=True)
        ]
        return [span for span in spans if span[0] < span[1]]

    def tokens_by_exit(self, num_tokens: int, start: int = 0) -> dict[int, int]:
        """How many tokens each exit makes; arguments as ``spans``."""
        return {exit_layer: end - k for k, end, exit_layer in self.spans(num_tokens, start)}

    def mean(self, value: Callable[[int], float], num_tokens: int, start: int = 0) -> float:
        """The mean over an answer's tokens of what each exit is given; arguments as ``spans``.

        Of no token at all: what the exit of token ``start`` is given.
        """
        counts = self.tokens_by_exit(num_tokens, start)
        if not counts:
            return value(self.exit_at(start))
        return sum(value(e) * count for e, count in counts.items()) / sum(counts.values())


@dataclass(frozen=True, kw_only=True)
class ScheduleInfo:
    """A depth schedule that the checkpoint's evaluation has measured."""

    schedule: DepthSchedule
    num_tokens: int
    """Length of the answer that ``compute`` is for."""
    compute: float
    """Mean share of the full model's FLOPs per token of such an answer; in (0, 1]."""
    score: float | None = None
    """Quality relative to the full model, over the answers it was measured on; in [0, 1]."""
    quality: Mapping[str, float] | None = None


def read_schedule(value: object, param: str) -> DepthSchedule:
    """A schedule from what a user gave: one, or its pairs.

    Raises:
        InvalidRequestError: it is none; the message names ``param`` and the value.
    """
    if isinstance(value, DepthSchedule):
        return value
    try:
        return DepthSchedule.of(value)
    except ValueError as error:
        message = f"{param}={shortened(value)} is not allowed: {error}."
        raise InvalidRequestError(message, param=param) from None


def starting_exits(
    schedule: DepthSchedule, exits: Sequence[int], *, may_lower: bool
) -> tuple[int, ...]:
    """The exits at which a request with a schedule may begin, ascending.

    Args:
        schedule: of the request's budget.
        exits: of the checkpoint, ascending.
        may_lower: whether it may go down before its tokens: only for a time.

    Raises:
        InvalidRequestError: the schedule names what is no exit.
    """
    for exit_layer in schedule.exits:
        if exit_layer not in exits:
            raise InvalidRequestError(
                f"budget.schedule={shortened(schedule.document)} names {exit_layer}, which is not "
                f"an exit of this checkpoint: choose one of {list(exits)}.",
                param="budget.schedule",
            )
    last, first = schedule.exits[0], schedule.exits[-1]
    return tuple(e for e in exits if last <= e <= first) if may_lower else (first,)


def mean_over_tokens(
    value: Callable[[int], float],
    exit_layer: int,
    schedule: DepthSchedule | None,
    num_tokens: int,
    start: int = 0,
) -> float:
    """The mean over an answer's tokens of what the exit of each is given.

    Args:
        value: of an exit.
        exit_layer: of every token; under a schedule none is deeper.
        schedule: None: there is none.
        num_tokens: of the whole answer.
        start: tokens before it do not count.
    """
    if schedule is None:
        return value(exit_layer)
    return schedule.mean(lambda e: value(min(e, exit_layer)), num_tokens, start)


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _checked(pairs: Any) -> tuple[tuple[int, int], ...]:
    if not _is_list(pairs) or not 1 <= len(pairs) <= MAX_PARTS:
        raise ValueError(f"it must be {_FORM}")
    for i, pair in enumerate(pairs):
        if not (_is_list(pair) and len(pair) == 2 and all(map(_is_count, pair))):
            raise ValueError(
                f"its entry {i}, {shortened(pair)}, must be a pair [k, E] of integers from 0 to "
                f"{MAX_TOKEN}: from output token k on, exit E"
            )
    parts = tuple((k, exit_layer) for k, exit_layer in pairs)
    if parts[0][0] != 0:
        raise ValueError(f"it must begin at output token 0, not at {parts[0][0]}")
    for (k, exit_layer), (next_k, next_exit) in pairwise(parts):
        if next_k <= k:
            raise ValueError(f"its tokens must ascend, but {next_k} follows {k}")
        if next_exit >= exit_layer:
            raise ValueError(f"its exits must descend, but {next_exit} follows {exit_layer}")
    if parts[-1][1] < 1:
        raise ValueError(f"{parts[-1][1]} is no exit: exits are integers >= 1")
    return parts


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
