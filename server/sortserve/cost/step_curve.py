"""How long a step really takes, for the simulator: no straight line (no torch).

    step = start + layers * curve(tokens of a layer) + d * layer-KV-tokens + h * sampled rows

The cost model of the scheduler has two lines, for it is asked a thousand times a second. A machine
has neither: a step of two to twelve rows reads the same weights as a step of one and takes hardly
longer, so the line from one row to 32 says up to a third too much of it. A simulation with lines
for the truth queues where the machine does not. Here the time of a layer is piecewise linear in
its tokens, with a knot at each power of two.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sortserve.cost.model import REGIME_TOKENS, Samples, StepShape, is_time

__all__ = ["StepCurve", "spread"]

KNOTS = tuple(float(2**i) for i in range(11))
NUM_SWEEPS = 3000
SETTLED = 1e-7
"""A sweep that changes no unknown by more of the largest one is the last."""
LEAST_S = 1e-6
"""No step takes less, whatever was fitted: a clock must move."""


@dataclass(frozen=True, kw_only=True)
class StepCurve:
    """What a step takes, in seconds."""

    start_s: tuple[float, float]
    """Whatever it runs: of steps with up to ``REGIME_TOKENS`` tokens, and of larger ones."""
    layer_s: tuple[float, ...]
    """A layer's, with as many tokens as each of ``KNOTS``; beyond the last it goes straight on."""
    kv_s: tuple[float, float]
    """For each layer and cached token read: in small and in large steps."""
    sampled_s: float
    """For each row that samples."""

    @classmethod
    def fit(cls, samples: Samples) -> StepCurve:
        """Least relative squares over measured steps; nothing is negative, no curve falls.

        Of a shape that was measured several times the median counts. Samples whose seconds are no
        time count for nothing.
        """
        usable = [(shape, statistics.median(times)) for shape, times in _by_shape(samples).items()]
        assert usable, "nothing was measured"
        times = np.array([seconds for _, seconds in usable])
        features = np.array([_features(shape) for shape, _ in usable]) / times[:, None]
        x = _non_negative(features, np.ones(len(usable)))
        ramps = x[2 : 2 + len(KNOTS)]
        kv_small, kv_large, sampled_s = x[2 + len(KNOTS) :]
        return cls(
            start_s=(float(x[0]), float(x[1])),
            layer_s=tuple(map(float, np.cumsum(ramps))),
            kv_s=(float(kv_small), float(kv_large)),
            sampled_s=float(sampled_s),
        )

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step."""
        is_large = shape.num_tokens > REGIME_TOKENS
        tokens = shape.layer_tokens / max(shape.num_layers, 1)
        return max(
            self.start_s[is_large]
            + shape.num_layers * self._layer_s(tokens)
            + self.kv_s[is_large] * shape.layer_kv_tokens
            + self.sampled_s * shape.num_sampled,
            LEAST_S,
        )

    def _layer_s(self, num_tokens: float) -> float:
        right = min(max(bisect.bisect_left(KNOTS, num_tokens), 1), len(KNOTS) - 1)
        low, high = KNOTS[right - 1], KNOTS[right]
        at_low, at_high = self.layer_s[right - 1], self.layer_s[right]
        share = max(0.0, (num_tokens - low) / (high - low))
        return at_low + share * (at_high - at_low)

    def later(self, small_s: float, large_s: float) -> StepCurve:
        """The same with some seconds more in every small and in every large step."""
        return replace(self, start_s=(self.start_s[0] + small_s, self.start_s[1] + large_s))

    def slower(self, small: float, large: float) -> StepCurve:
        """The same with the times of small and of large steps multiplied."""
        factors = [small if tokens <= REGIME_TOKENS else large for tokens in KNOTS]
        return StepCurve(
            start_s=(small * self.start_s[0], large * self.start_s[1]),
            layer_s=tuple(f * seconds for f, seconds in zip(factors, self.layer_s, strict=True)),
            kv_s=(small * self.kv_s[0], large * self.kv_s[1]),
            sampled_s=small * self.sampled_s,
        )


def spread(samples: Samples) -> float | None:
    """The standard deviation of the logarithm of a step's time, over runs of equal steps.

    None where no step was run twice.
    """
    logarithms = [
        math.log(seconds / statistics.median(times))
        for times in _by_shape(samples).values()
        for seconds in times
        if len(times) > 1
    ]
    if not logarithms:
        return None
    return math.sqrt(statistics.fmean(value**2 for value in logarithms))


def _by_shape(samples: Samples) -> dict[StepShape, list[float]]:
    """The times that each shape took, without those that are none."""
    times: dict[StepShape, list[float]] = {}
    for shape, seconds in samples:
        if is_time(seconds):
            times.setdefault(shape, []).append(seconds)
    return times


def _features(shape: StepShape) -> list[float]:
    """What the unknowns multiply: two starts, the rises of the curve, two KV costs, sampling."""
    is_large = shape.num_tokens > REGIME_TOKENS
    tokens = shape.layer_tokens / max(shape.num_layers, 1)
    rises = [1.0]
    for low, high in itertools.pairwise(KNOTS):
        most = float("inf") if high == KNOTS[-1] else 1.0
        rises.append(min(max((tokens - low) / (high - low), 0.0), most))
    by_layer = [shape.num_layers * rise for rise in rises]
    kv = float(shape.layer_kv_tokens)
    starts, kvs = ([0.0, 1.0], [0.0, kv]) if is_large else ([1.0, 0.0], [kv, 0.0])
    return [*starts, *by_layer, *kvs, float(shape.num_sampled)]


def _non_negative(
    features: NDArray[np.float64], targets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Least squares over x >= 0, one unknown after the other; those nothing says of stay 0."""
    scale = np.sqrt((features**2).sum(axis=0))
    used = scale > 0
    scaled = features[:, used] / scale[used]
    matrix, vector = scaled.T @ scaled, scaled.T @ targets
    x = np.zeros(int(used.sum()))
    for _ in range(NUM_SWEEPS):
        before = x.copy()
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + vector[i] - matrix[i] @ x)
        if np.abs(x - before).max() <= SETTLED * max(float(x.max()), 1e-300):
            break
    found = np.zeros(features.shape[1])
    found[used] = x / scale[used]
    return found
