"""How long a step takes, from what it runs (no torch).

    step = c0 + a * layers + b * layer-tokens + d * layer-KV-tokens + h * sampled rows

Layers of one model cost the same, so the sum over segments of the design collapses to sums over
layers: ``layer-tokens`` is the sum over tokens of the depth they run to, ``layer-KV-tokens`` the
same for cached tokens read. Small batches are bound by reading weights and large ones by
arithmetic, so two lines are fitted, split at ``REGIME_TOKENS`` (Niyama splits at 512 on a GPU).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "REGIME_TOKENS",
    "CostModel",
    "Line",
    "RowShape",
    "StepShape",
    "solve_non_negative",
]

REGIME_TOKENS = 48

Line = tuple[float, float, float, float, float]
"""Seconds per step, layer, layer-token, layer-KV-token and sampled row."""


@dataclass(frozen=True)
class RowShape:
    """The part of a row that costs time."""

    exit_layer: int
    num_tokens: int
    context_len: int
    samples: bool


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


@dataclass(frozen=True)
class CostModel:
    """Coefficients for small and for large steps: one frozen answer, safe to read anywhere."""

    small: Line
    large: Line
    safety: float = 1.2
    """Factor on every promised time: a high quantile of actual over predicted, of some steps
    together, once steps have been seen; Niyama's 1.2 before."""

    @classmethod
    def fit(cls, samples: Sequence[tuple[StepShape, float]]) -> CostModel:
        """Least relative squares over measured (shape, seconds), no coefficient negative."""
        assert samples, "nothing was measured"
        small = [s for s in samples if s[0].num_tokens <= REGIME_TOKENS] or list(samples)
        large = [s for s in samples if s[0].num_tokens > REGIME_TOKENS] or list(samples)
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


def _fit_line(samples: Sequence[tuple[StepShape, float]]) -> Line:
    """Relative errors count: a millisecond is much of a small step and little of a large one."""
    times = np.array([seconds for _, seconds in samples])
    features = np.array([shape.features for shape, _ in samples])
    weighted = features / times[:, None]
    return solve_non_negative(weighted.T @ weighted, weighted.sum(axis=0))


def solve_non_negative(matrix: NDArray[np.float64], vector: NDArray[np.float64]) -> Line:
    """Minimise x'Ax / 2 - b'x over x >= 0, by dropping the most negative unknown until none is."""
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
    c0, a, b, d, h = (float(value) for value in unknowns / scale)
    return c0, a, b, d, h
