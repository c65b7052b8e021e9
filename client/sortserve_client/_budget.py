"""What one request may cost, as the client says it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

__all__ = ["Budget", "OnMiss"]

OnMiss = Literal["degrade", "truncate", "reject"]

_TIMES = ("latency_ms", "ttft_ms", "tpot_ms")
_DEPTHS = ("exit_layer", "min_exit_layer")
_CHOOSES_AN_EXIT = ("compute", "min_exit_layer", "min_quality")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one request may cost. All fields are optional and combine.

    ``exit_layer`` fixes the depth, so it excludes ``compute`` and the two floors.

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
        if self.exit_layer is not None:
            for name in _CHOOSES_AN_EXIT:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"budget.exit_layer={self.exit_layer} fixes the depth, so budget.{name} "
                        "cannot be given with it. Drop one of the two."
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
        return {name: value for name, value in values.items() if value is not None}


def _refuse(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"budget.{name}={value!r} is not allowed: it must be {allowed}.")
