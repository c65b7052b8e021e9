"""How long a step takes, from what it runs (no torch).

    step = c0 + a * layers + b * layer-tokens + d * layer-KV-tokens + h * sampled rows

Layers of one model cost the same, so the sum over segments collapses to sums over
layers: ``layer-tokens`` is the sum over tokens of the depth they run to, ``layer-KV-tokens`` the
same for cached tokens read. Small batches are bound by reading weights and large ones by
arithmetic, so two lines are fitted, split at ``REGIME_TOKENS`` (Niyama splits at 512 on a GPU).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sortserve.core.plan import StepPlan

__all__ = [
    "LEAST",
    "MOST_S",
    "REGIME_TOKENS",
    "CostModel",
    "Line",
    "RowShape",
    "Samples",
    "StepShape",
    "by_regime",
    "is_time",
    "solve_non_negative",
    "step_shape",
]

REGIME_TOKENS = 48

Line = tuple[float, float, float, float, float]
"""Seconds per step, layer, layer-token, layer-KV-token and sampled row."""

LEAST: Line = (1e-9, 0.0, 1e-12, 0.0, 0.0)
"""No coefficient is less: every step, row and token takes some time, so each can be divided by."""
MOST_S = 1e6
"""No coefficient is more: whatever is summed and multiplied from them stays finite."""
SAFETY_LIMITS = (0.1, 100.0)
TIME_LIMITS_S = (1e-7, 1e5)
"""A step that took less or more was not measured."""


@dataclass(frozen=True)
class RowShape:
    """The part of a row that costs time."""

    exit_layer: int
    num_tokens: int
    context_len: int
    samples: int
    """Tokens that pass the head."""


@dataclass(frozen=True)
class StepShape:
    """A step reduced to the numbers its time depends on."""

    num_layers: int
    """The deepest row's."""
    num_tokens: int
    layer_tokens: int
    layer_kv_tokens: int
    num_sampled: int

    @classmethod
    def of(cls, rows: Iterable[RowShape]) -> StepShape:
        """The shape of a step with these rows."""
        rows = list(rows)
        return cls(
            num_layers=max((row.exit_layer for row in rows), default=0),
            num_tokens=sum(row.num_tokens for row in rows),
            layer_tokens=sum(row.exit_layer * row.num_tokens for row in rows),
            layer_kv_tokens=sum(
                row.exit_layer * row.num_tokens * (row.context_len - row.num_tokens // 2)
                for row in rows
            ),
            num_sampled=sum(row.samples for row in rows),
        )

    @property
    def features(self) -> tuple[float, float, float, float, float]:
        """What the coefficients multiply."""
        return (
            1.0,
            float(self.num_layers),
            float(self.layer_tokens),
            float(self.layer_kv_tokens),
            float(self.num_sampled),
        )


Samples = Sequence[tuple[StepShape, float]]
"""Measured steps: what ran, and the seconds it took."""


def is_time(seconds: float) -> bool:
    """Whether a step can have taken so long: no NaN, no infinity, not nothing."""
    low, high = TIME_LIMITS_S
    return low <= seconds <= high


def by_regime(samples: Samples) -> tuple[Samples, Samples]:
    """The samples of small and of large steps; all of them where a regime has none."""
    small = [s for s in samples if s[0].num_tokens <= REGIME_TOKENS]
    large = [s for s in samples if s[0].num_tokens > REGIME_TOKENS]
    return small or samples, large or samples


def step_shape(plan: StepPlan) -> StepShape:
    """A plan reduced to what its time depends on."""
    return StepShape.of(
        RowShape(row.exit_layer, row.num_tokens, row.context_len, row.num_head_tokens)
        for row in plan.rows
    )


@dataclass(frozen=True)
class CostModel:
    """Coefficients for small and for large steps: one frozen answer, safe to read anywhere.

    Every number is brought within bounds here (see ``LEAST`` and ``MOST_S``): predicted times are
    above zero and finite, whatever was fitted or given.

    Raises:
        ValueError: one is not a number.
    """

    small: Line
    large: Line
    safety: float = 1.2
    """Factor on every promised time: a high quantile of actual over predicted, of some steps
    together, once steps have been seen; Niyama's 1.2 before."""

    def __post_init__(self) -> None:
        if any(map(math.isnan, (*self.small, *self.large, self.safety))):
            raise ValueError(f"a cost model is made of numbers: {self}")
        low, high = SAFETY_LIMITS
        object.__setattr__(self, "small", _bounded(self.small))
        object.__setattr__(self, "large", _bounded(self.large))
        object.__setattr__(self, "safety", min(max(self.safety, low), high))

    @classmethod
    def fit(cls, samples: Samples) -> CostModel:
        """Least relative squares over measured steps, no coefficient negative.

        Samples whose seconds are no time (``is_time``) count for nothing.
        """
        usable = [sample for sample in samples if is_time(sample[1])]
        assert usable, "nothing was measured"
        small, large = by_regime(usable)
        return cls(small=_fit_line(small), large=_fit_line(large))

    def line(self, num_tokens: int) -> Line:
        """The coefficients for steps of so many tokens."""
        return self.small if num_tokens <= REGIME_TOKENS else self.large

    def step_s(self, shape: StepShape) -> float:
        """Predicted seconds of one step."""
        c0, a, b, d, h = self.line(shape.num_tokens)
        return (
            c0
            + a * shape.num_layers
            + b * shape.layer_tokens
            + d * shape.layer_kv_tokens
            + h * shape.num_sampled
        )

    def prefill_s(
        self, exit_layer: int, num_tokens: int, *, start: int = 0, chunk: int = 1024
    ) -> float:
        """Predicted seconds of a prompt alone, in chunks, after ``start`` tokens in the cache."""
        if num_tokens <= 0:
            return 0.0
        c0, a, b, d, h = self.line(min(num_tokens, chunk))
        num_steps = -(-num_tokens // chunk)
        kv_tokens = num_tokens * (start + num_tokens / 2)
        return num_steps * (c0 + a * exit_layer) + exit_layer * (b * num_tokens + d * kv_tokens) + h


def _bounded(line: Line) -> Line:
    c0, a, b, d, h = (
        min(max(value, least), MOST_S) for value, least in zip(line, LEAST, strict=True)
    )
    return c0, a, b, d, h


def _fit_line(samples: Samples) -> Line:
    """Relative errors count: a millisecond is much of a small step and little of a large one."""
    times = np.array([seconds for _, seconds in samples])
    features = np.array([shape.features for shape, _ in samples])
    weighted = features / times[:, None]
    line = solve_non_negative(weighted.T @ weighted, weighted.sum(axis=0))
    return (float(np.median(times)), 0.0, 0.0, 0.0, 0.0) if line is None else line


def solve_non_negative(matrix: NDArray[np.float64], vector: NDArray[np.float64]) -> Line | None:
    """Minimise x'Ax / 2 - b'x over x >= 0, by dropping the most negative unknown until none is.

    None if there is no finite answer.
    """
    if not (np.isfinite(matrix).all() and np.isfinite(vector).all()):
        return None
    try:
        unknowns = _solve(matrix, vector)
    except np.linalg.LinAlgError:  # the decomposition did not converge
        return None
    if not np.isfinite(unknowns).all():
        return None
    c0, a, b, d, h = (float(value) for value in unknowns)
    return c0, a, b, d, h


def _solve(matrix: NDArray[np.float64], vector: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    scaled, target = matrix / np.outer(scale, scale), vector / scale
    active = [i for i in range(len(vector)) if matrix[i, i] > 0]
    solution = np.zeros(0)
    while active:
        solution, *_ = np.linalg.lstsq(scaled[np.ix_(active, active)], target[active], rcond=1e-9)
        if solution.min() >= 0:
            break
        active.pop(int(solution.argmin()))
    unknowns = np.zeros(len(vector))
    unknowns[active] = solution[: len(active)] if active else 0.0
    return unknowns / scale
