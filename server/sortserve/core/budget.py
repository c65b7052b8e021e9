"""What a request may cost: parse, validate, turn into absolute deadlines (no torch)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from sortserve.core.budget_ranges import MILLISECONDS, RANGES
from sortserve.core.errors import InvalidRequestError, shortened
from sortserve.core.exit_info import ExitInfo
from sortserve.core.schedule import DepthSchedule, ScheduleInfo, read_schedule, starting_exits

__all__ = [
    "BUDGET_FIELDS",
    "BUDGET_KINDS",
    "DEFAULT_MIN_QUALITY",
    "MILLISECONDS",
    "RANGES",
    "Budget",
    "Deadlines",
    "ExitInfo",
    "ExitTable",
    "OnMiss",
]

DEFAULT_MIN_QUALITY = 0.5
"""The floor of requests that name none: a token at least half as likely as at full depth."""

_FIXING = ("exit_layer", "schedule")
_CHOOSING = ("compute", "min_exit_layer", "min_quality")
BUDGET_KINDS = (
    *("latency_ms", "ttft_ms", "tpot_ms", "compute"),
    *(*_FIXING, "min_exit_layer", "min_quality"),
)
"""The bounds that a request may give, for the ``kind`` label of the metrics."""
BUDGET_FIELDS = (*BUDGET_KINDS, "on_miss")
"""All that a request may give; what else there is of a ``Budget`` is the server's to set."""


class OnMiss(StrEnum):
    """What to do when no allowed exit fits the latency budget."""

    DEGRADE = "degrade"
    TRUNCATE = "truncate"
    REJECT = "reject"


@dataclass(frozen=True)
class ExitTable:
    """The exits of the served checkpoint, shallowest first; the last is the full model."""

    exits: tuple[ExitInfo, ...]
    min_quality: float = 0.0
    """The floor of every budget that names none, in [0, 1]; see ``served_unasked``."""
    schedules: tuple[ScheduleInfo, ...] = ()
    """Those that were measured; each names exits of the table."""

    def __post_init__(self) -> None:
        layers = self.layers
        assert layers, "a checkpoint has at least one exit"
        assert 0.0 <= self.min_quality <= 1.0
        assert list(layers) == sorted(set(layers)), "exits ascend"
        assert all(set(info.schedule.exits) <= set(layers) for info in self.schedules)

    @property
    def layers(self) -> tuple[int, ...]:
        """The exit layers, ascending."""
        return tuple(info.exit_layer for info in self.exits)

    @property
    def full(self) -> int:
        """The full model's number of layers."""
        return self.exits[-1].exit_layer

    @cached_property
    def is_measured(self) -> bool:
        """Whether the checkpoint says how good each exit is beside the full model."""
        return all(info.score is not None for info in self.exits[:-1])

    @cached_property
    def scores(self) -> Mapping[int, float]:
        """What a token of each exit is worth beside one of the full model: 1 there, ascending.

        Measured quality; the share of layers where it was not measured. An exit that was measured
        better than a deeper one counts as good as the best below it: nobody is sent deeper for
        less.
        """
        own = {
            info.exit_layer: (
                info.score
                if self.is_measured and info.score is not None
                else info.exit_layer / self.full
            )
            for info in self.exits
        }
        own[self.full] = 1.0
        best = itertools.accumulate(own.values(), max)
        return dict(zip(own, best, strict=True))

    @cached_property
    def measured_schedules(self) -> Mapping[DepthSchedule, float]:
        """What an answer under each measured schedule is worth beside one of the full model.

        Those that change the exit, where the exits were measured, too.
        """
        return {
            info.schedule: info.score
            for info in self.schedules
            if self.is_measured and info.score is not None and len(info.schedule.parts) > 1
        }

    @cached_property
    def served_unasked(self) -> tuple[int, ...]:
        """The exits whose score is at least ``min_quality``, ascending; the full depth always.

        The others are for those who name the exit or a floor of their own.
        """
        return self._worth(self.min_quality)

    def _worth(self, min_quality: float) -> tuple[int, ...]:
        """The exits of at least that score, ascending."""
        return tuple(e for e in self.layers if self.scores[e] >= min_quality)

    def __getitem__(self, exit_layer: int) -> ExitInfo:
        for info in self.exits:
            if info.exit_layer == exit_layer:
                return info
        raise KeyError(exit_layer)

    def allowed(self, budget: Budget) -> tuple[int, ...]:
        """Exits that keep the budget's depth, compute and quality bounds, ascending.

        Raises:
            InvalidRequestError: the bounds name an exit that does not exist, or leave none.
        """
        if budget.exit_layer is not None:
            self._require_exit(budget.exit_layer, "budget.exit_layer")
            return (budget.exit_layer,)
        if budget.schedule is not None:
            return starting_exits(budget.schedule, self.layers, may_lower=budget.has_latency)
        if budget.min_exit_layer is not None and budget.min_exit_layer > self.full:
            raise InvalidRequestError(
                f"budget.min_exit_layer={shortened(budget.min_exit_layer)} is deeper than the "
                f"model: the exits are {list(self.layers)}.",
                param="budget.min_exit_layer",
            )
        floor, most = self._above_floor(budget), budget.max_exit_layer
        if most is not None:
            floor = tuple(e for e in floor if e <= most) or (most,)
        allowed = tuple(e for e in floor if self._is_cheap(e, budget))
        if not allowed:
            raise self._too_cheap(budget, floor)
        return allowed

    def _above_floor(self, budget: Budget) -> tuple[int, ...]:
        """The exits that the floors leave, ascending: the budget's own, or else ours."""
        if not budget.names_floor:
            floor = budget.structured_min_quality
            return self.served_unasked if floor is None else self._worth(floor)
        return tuple(
            info.exit_layer
            for info in self.exits
            if info.exit_layer >= (budget.min_exit_layer or 0)
            and (not budget.min_quality or self._score(info) >= budget.min_quality)
        )

    def _is_cheap(self, exit_layer: int, budget: Budget) -> bool:
        return budget.compute is None or self[exit_layer].compute <= budget.compute

    def _too_cheap(self, budget: Budget, floor: tuple[int, ...]) -> InvalidRequestError:
        """Why ``compute`` leaves none of the exits above the floor."""
        shallowest = self[floor[0]]
        why = (
            f"budget.compute={budget.compute} leaves no exit: the shallowest allowed one, "
            f"exit {shallowest.exit_layer}, costs {shallowest.compute:.3f} of the full model."
        )
        cheap = [e for e in self.layers if self._is_cheap(e, budget)]
        if budget.names_floor or not cheap:
            advice = "Raise compute or lower the floor." if cheap else "Raise compute."
            return InvalidRequestError(f"{why} {advice}", param="budget.compute")
        deepest, own = cheap[-1], self[cheap[-1]].score
        flag, floor_score = "min-quality", self.min_quality
        if budget.structured_min_quality is not None:
            flag, floor_score = "structured-min-quality", budget.structured_min_quality
        accepted = f"budget.min_exit_layer={deepest}"
        if self.is_measured and own is not None:  # a floor of quality is refused elsewhere
            accepted = f"budget.min_quality={_rounded_down(own):g}"
        return InvalidRequestError(
            f"{why} Exit {deepest} would be cheap enough, but its score of "
            f"{self.scores[deepest]:.3g} is below this server's --{flag}={floor_score:g},"
            " the floor of requests that name none. Raise compute, or name what you accept: "
            f"{accepted} or budget.exit_layer={deepest}.",
            param="budget.compute",
        )

    def _require_exit(self, exit_layer: int, param: str) -> None:
        if exit_layer not in self.layers:
            raise InvalidRequestError(
                f"{param}={shortened(exit_layer)} is not an exit of this checkpoint: "
                f"choose one of {list(self.layers)}.",
                param=param,
            )

    def _score(self, info: ExitInfo) -> float:
        if info.exit_layer == self.full:
            return 1.0
        if info.score is None:
            raise InvalidRequestError(
                "budget.min_quality needs a checkpoint whose sorted.json has measured quality "
                f"scores; exit {info.exit_layer} has none. Use min_exit_layer instead.",
                param="budget.min_quality",
            )
        return info.score


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one request may cost. All fields are optional and combine; times in milliseconds.

    ``exit_layer`` and ``schedule`` exclude each other, and every bound that would choose an exit
    (compute and the floors).

    Raises:
        InvalidRequestError: a value is out of range or two fields contradict each other.
    """

    latency_ms: float | None = None
    """The whole answer, from arrival to the last token."""
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    """Mean time per output token after the first."""
    compute: float | None = None
    """Largest share of the full model's FLOPs per token, head included; in (0, 1]."""
    exit_layer: int | None = None
    schedule: DepthSchedule | None = None
    """From output token k on, exit E; given as pairs [k, E]. Never deeper."""
    min_exit_layer: int | None = None
    min_quality: float | None = None
    on_miss: OnMiss = OnMiss.DEGRADE
    max_exit_layer: int | None = None
    """The deepest exit to choose, which is one of the checkpoint; the server sets it for a key's
    sake, and no request can. It wins over ``ExitTable.min_quality``."""
    structured_min_quality: float | None = None
    """In place of ``ExitTable.min_quality``, for an answer that must have a form; the server sets
    it, and no request can. It is no floor that a request names: it lets nobody take depth."""

    def __post_init__(self) -> None:
        for name, range_ in RANGES.items():
            value = getattr(self, name)
            if value is not None and value not in range_:
                raise _refuse(name, value, range_.allowed)
        try:
            object.__setattr__(self, "on_miss", OnMiss(self.on_miss))
        except ValueError:
            raise _refuse("on_miss", self.on_miss, "degrade, truncate or reject") from None
        if self.schedule is not None:
            object.__setattr__(self, "schedule", read_schedule(self.schedule, "budget.schedule"))
        self._check_one_choice()
        ttft, latency = self.ttft_ms, self.latency_ms
        if ttft is not None and latency is not None and ttft > latency:
            raise InvalidRequestError(
                f"budget.ttft_ms={ttft} is above budget.latency_ms={latency}: "
                "the first token cannot be due after the whole answer.",
                param="budget.ttft_ms",
            )

    def _check_one_choice(self) -> None:
        fixed = [name for name in _FIXING if getattr(self, name) is not None]
        others = [n for n in (*fixed[1:], *_CHOOSING) if getattr(self, n) is not None]
        if fixed and others:
            depth = getattr(self, fixed[0])
            value = depth.document if isinstance(depth, DepthSchedule) else depth
            raise InvalidRequestError(
                f"budget.{fixed[0]}={shortened(value)} fixes the depth, so budget.{others[0]} "
                "cannot be given with it. Drop one of the two.",
                param=f"budget.{others[0]}",
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Budget:
        """A budget from a JSON object; null means absent.

        Raises:
            InvalidRequestError: an unknown field, or a value that is not allowed.
        """
        for name in values:
            if name not in BUDGET_FIELDS:
                raise InvalidRequestError(
                    f"budget.{name} is not a field: a budget may have {', '.join(BUDGET_FIELDS)}.",
                    param=f"budget.{name}",
                )
        return cls(**{name: value for name, value in values.items() if value is not None})

    @property
    def names_floor(self) -> bool:
        """Whether it says how shallow an exit may be; 0 and 1 are floors, too."""
        return self.min_exit_layer is not None or self.min_quality is not None

    @property
    def fixes_depth(self) -> bool:
        """Whether it names the exit of each token."""
        return self.exit_layer is not None or self.schedule is not None

    @property
    def has_latency(self) -> bool:
        """Whether any time is bounded."""
        return not (self.latency_ms is None and self.ttft_ms is None and self.tpot_ms is None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The bounds that were given, for the ``kind`` label of the metrics."""
        return tuple(name for name in BUDGET_KINDS if getattr(self, name) is not None)

    def deadlines(self, arrival_s: float) -> Deadlines:
        """The absolute times this budget means for a request that arrived at ``arrival_s``."""
        return Deadlines(
            ttft_s=None if self.ttft_ms is None else arrival_s + self.ttft_ms / 1e3,
            e2e_s=None if self.latency_ms is None else arrival_s + self.latency_ms / 1e3,
            tpot_s=None if self.tpot_ms is None else self.tpot_ms / 1e3,
        )


@dataclass(frozen=True)
class Deadlines:
    """Times on the engine's monotonic clock, in seconds; ``tpot_s`` is a duration."""

    ttft_s: float | None = None
    e2e_s: float | None = None
    tpot_s: float | None = None


def _rounded_down(score: float) -> float:
    """A floor that the score is not below, short enough to be typed."""
    return math.floor(score * 1000) / 1000


def _refuse(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"budget.{name}={shortened(value)} is not allowed: it must be {allowed}.",
        param=f"budget.{name}",
    )
