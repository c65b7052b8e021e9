"""Is a long run flat? Pure functions of what was sampled."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Drift", "drift_of", "growth_of", "thirds"]

MAX_PAIRS = 400
"""Samples of which slopes are taken; of more, every so many."""


@dataclass(frozen=True)
class Drift:
    """How the last third of a series compares with its first."""

    first: float
    last: float
    slope_per_hour: float
    """The median of the slopes between all pairs (Theil and Sen), relative to the median."""

    @property
    def ratio(self) -> float:
        """1 is none."""
        return self.last / self.first if self.first else float("inf")


def thirds(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The first and the last third of a series.

    Raises:
        ValueError: fewer than three values.
    """
    if len(values) < 3:
        raise ValueError(f"{len(values)} samples are too few: run for longer")
    size = len(values) // 3
    return values[:size], values[-size:]


def drift_of(times_s: Sequence[float], values: Sequence[float]) -> Drift:
    """The drift of a series by medians, which a few slow moments of the machine do not move.

    Raises:
        ValueError: fewer than three values.
    """
    first, last = thirds(values)
    step = max(1, len(values) // MAX_PAIRS)
    points = list(zip(times_s, values, strict=True))[::step]
    slopes = [
        (b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2) if b[0] > a[0]
    ]
    middle = statistics.median(values)
    slope = statistics.median(slopes) * 3600 / middle if slopes and middle else 0.0
    return Drift(statistics.median(first), statistics.median(last), slope)


def growth_of(values: Sequence[float]) -> float:
    """How much the median of the last third is above that of the first; 0.03 is 3 %.

    Raises:
        ValueError: fewer than three values.
    """
    first, last = (statistics.median(part) for part in thirds(values))
    return last / first - 1.0
