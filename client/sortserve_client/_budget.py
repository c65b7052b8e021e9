"""What one request may cost, as the client says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, get_args

__all__ = ["Budget", "OnMiss"]

OnMiss = Literal["degrade", "truncate", "reject"]

_TIMES = ("latency_ms", "ttft_ms", "tpot_ms")
_DEPTHS = ("exit_layer", "min_exit_layer")
_MAX_PARTS = 64
_FIXES_THE_DEPTH = ("exit_layer", "schedule")
_CHOOSES_AN_EXIT = ("compute", "min_exit_layer", "min_quality")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one request may cost. All fields are optional and combine.

    ``exit_layer`` and ``schedule`` fix the depth, so they exclude each other, ``compute`` and the
    two floors.

    Raises:
        ValueError: a value is out of range, or two fields contradict each other. The server checks
            again, with what it knows of the model.
    """

    latency_ms: float | None = None
    """The whole answer, from arrival at the server to the last token."""
    ttft_ms: float | None = None
    """Arrival to the first token."""
    tpot_ms: float | None = None
    """Mean time per output token after the first."""
    compute: float | None = None
    """Largest share of the full model's FLOPs per token; in (0, 1]."""
    exit_layer: int | None = None
    """Exactly this exit."""
    schedule: Sequence[Sequence[int]] | None = None
    """Pairs (k, E): from output token k on, exit E. The first k is 0, and exits descend."""
    min_exit_layer: int | None = None
    """No exit shallower than this one."""
    min_quality: float | None = None
    """No exit whose measured score, relative to the full model, is below this; in [0, 1]. 0 lifts
    the server's own floor."""
    on_miss: OnMiss | None = None
    """If no allowed exit fits the times: answer as well as possible (``degrade``, the default),
    stop at the deadline (``truncate``), or refuse at once (``reject``)."""

    def __post_init__(self) -> None:
        for name in _TIMES:
            self._check_number(name, math.inf, "a finite number of milliseconds above 0")
        self._check_number("compute", 1.0, "a number above 0 and at most 1")
        if self.min_quality != 0 or isinstance(self.min_quality, bool):
            self._check_number("min_quality", 1.0, "a number from 0 to 1")
        for name in _DEPTHS:
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise _refuse(name, value, "an integer >= 1, an exit of the model")
        if self.schedule is not None:
            object.__setattr__(self, "schedule", _checked_schedule(self.schedule))
        if self.on_miss is not None and self.on_miss not in get_args(OnMiss):
            raise _refuse("on_miss", self.on_miss, "degrade, truncate or reject")
        self._check_pairs()

    def _check_number(self, name: str, high: float, allowed: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and 0 < value <= high):
            raise _refuse(name, value, allowed)

    def _check_pairs(self) -> None:
        fixed = [name for name in _FIXES_THE_DEPTH if getattr(self, name) is not None]
        others = [n for n in (*fixed[1:], *_CHOOSES_AN_EXIT) if getattr(self, n) is not None]
        if fixed and others:
            raise ValueError(
                f"budget.{fixed[0]}={getattr(self, fixed[0])} fixes the depth, so "
                f"budget.{others[0]} cannot be given with it. Drop one of the two."
            )
        ttft, latency = self.ttft_ms, self.latency_ms
        if ttft is not None and latency is not None and ttft > latency:
            raise ValueError(
                f"budget.ttft_ms={ttft} is above budget.latency_ms={latency}: "
                "the first token cannot be due after the whole answer."
            )

    def to_json(self) -> dict[str, Any]:
        """The ``budget`` object of a request: only the fields that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.schedule is not None:
            values["schedule"] = [list(pair) for pair in self.schedule]
        return {name: value for name, value in values.items() if value is not None}


def _refuse(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"budget.{name}={value!r} is not allowed: it must be {allowed}.")


def _checked_schedule(pairs: Any) -> tuple[tuple[int, int], ...]:
    def refuse(reason: str) -> ValueError:
        return ValueError(f"budget.schedule={pairs!r} is not allowed: {reason}.")

    if not _is_list(pairs) or not 1 <= len(pairs) <= _MAX_PARTS:
        raise refuse(f"it must be a list of 1 to {_MAX_PARTS} pairs [k, E]")
    for pair in pairs:
        if not (_is_list(pair) and len(pair) == 2 and all(type(n) is int for n in pair)):
            raise refuse(f"{pair!r} must be a pair [k, E] of integers")
    parts = tuple((k, exit_layer) for k, exit_layer in pairs)
    if parts[0][0] != 0:
        raise refuse("it must begin at output token 0")
    for (k, exit_layer), (next_k, next_exit) in pairwise(parts):
        if next_k <= k or next_exit >= exit_layer:
            raise refuse("its tokens must ascend and its exits descend")
    if parts[-1][1] < 1:
        raise refuse("exits are integers >= 1")
    return parts


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
