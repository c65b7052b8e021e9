"""Measured times without those in which the machine was held up (no torch)."""

from __future__ import annotations

import math

from sortserve.cost.model import REGIME_TOKENS, Samples, StepShape, is_time

__all__ = ["without_stalls"]

TOLERANCE = 1.2
"""A machine is no straight line, and no time is exact."""


def without_stalls(samples: Samples) -> list[tuple[StepShape, float]]:
    """The same steps, none with more time than the others of its regime allow.

    What a step runs costs something and never less than nothing, so a step that runs at most k
    times as much of everything as another takes at most k times as long. A step that was held up
    while it was timed breaks that, and a line that is fitted to it says too much of all steps
    beyond those that were timed. Only such times are cut, to ``TOLERANCE`` times what is allowed.
    """
    usable = [sample for sample in samples if is_time(sample[1])]
    return [(shape, min(seconds, _most_s(shape, usable))) for shape, seconds in samples]


def _most_s(shape: StepShape, samples: Samples) -> float:
    """What the other steps allow."""
    is_large = shape.num_tokens > REGIME_TOKENS
    return min(
        (
            TOLERANCE * seconds * _times_as_much(shape, other)
            for other, seconds in samples
            if other != shape and (other.num_tokens > REGIME_TOKENS) == is_large
        ),
        default=math.inf,
    )


def _times_as_much(shape: StepShape, other: StepShape) -> float:
    """The least k such that a step runs at most k times as much of everything as another."""
    pairs = zip(shape.features, other.features, strict=True)
    return max(0.0 if mine == 0 else mine / its if its else math.inf for mine, its in pairs)
