"""How long a step takes, from what it runs (no torch).

    step = c0 + a * layers + b * layer-tokens + d * layer-KV-tokens + h * sampled rows

Layers of one model cost the same, so the sum over segments of the design collapses to sums over
layers: ``layer-tokens`` is the sum over tokens of the depth they run to, ``layer-KV-tokens`` the
same for cached tokens read. Small batches are bound by reading weights and large ones by
arithmetic, so two lines are fitted, split at ``REGIME_TOKENS`` (Niyama splits at 512 on a GPU).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sortserve.outputs import Estimate
from sortserve.scheduling.policy import mean_step_rates

__all__ = ["REGIME_TOKENS", "CostModel", "Load", "RowShape", "StepShape"]

REGIME_TOKENS = 48


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
    def features(self) -> tuple[float, ...]:
        """What the coefficients multiply."""
        return (
            1.0,
            float(self.num_layers),
            float(self.layer_tokens),
            float(self.layer_kv_tokens),
            float(self.num_sampled),
        )


@dataclass(frozen=True)
class Load:
    """What the engine has promised already."""

    running_by_exit: Mapping[int, int]
    mean_context: float = 256.0
    num_waiting_tokens: int = 0
    """Prompt tokens queued before a newcomer."""


@dataclass(frozen=True)
class CostModel:
    """Coefficients (seconds per unit of each feature) for small and for large steps."""

    small: tuple[float, ...]
    large: tuple[float, ...]
    policy: str
    max_num_batched_tokens: int
    safety: float = 1.2
    """Factor on every promised time; Niyama's, until residuals are tracked."""

    @classmethod
    def fit(
        cls,
        samples: Sequence[tuple[StepShape, float]],
        *,
        policy: str,
        max_num_batched_tokens: int,
    ) -> CostModel:
        """Least relative squares over measured (shape, seconds), no coefficient negative."""
        assert samples, "nothing was measured"
        small = [s for s in samples if s[0].num_tokens <= REGIME_TOKENS] or list(samples)
        large = [s for s in samples if s[0].num_tokens > REGIME_TOKENS] or list(samples)
        return cls(
            small=_fit_line(small),
            large=_fit_line(large),
            policy=policy,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    def step_s(self, shape: StepShape) -> float:
        """Predicted seconds of one step."""
        line = self.small if shape.num_tokens <= REGIME_TOKENS else self.large
        return float(sum(c * f for c, f in zip(line, shape.features, strict=True)))

    def prefill_s(self, exit_layer: int, num_tokens: int) -> float:
        """Predicted seconds of a prompt alone, in chunks of the token budget."""
        total, done = 0.0, 0
        while done < num_tokens:
            chunk = min(num_tokens - done, self.max_num_batched_tokens)
            done += chunk
            row = RowShape(exit_layer, chunk, done, samples=done == num_tokens)
            total += self.step_s(StepShape.of([row]))
        return total

    def estimate(
        self, exit_layer: int, *, num_prompt_tokens: int, max_tokens: int, load: Load
    ) -> Estimate:
        """Predicted times of a newcomer at one exit, given what runs and waits now."""
        context = num_prompt_tokens + max_tokens // 2
        counts = dict(load.running_by_exit)
        counts[exit_layer] = counts.get(exit_layer, 0) + 1
        costs = {e: self._decode_s(e, counts, load, exit_layer, context) for e in counts}
        tpot = 1.0 / mean_step_rates(self.policy, costs)[exit_layer]
        # A newcomer waits for half a step, then for the prompts before it; its own prompt shares
        # the steps with the decoding rows.
        wait = max(costs.values()) / 2 if load.running_by_exit else 0.0
        deepest = max(costs)
        queue = self.prefill_s(deepest, load.num_waiting_tokens) if load.num_waiting_tokens else 0.0
        shared = tpot if load.running_by_exit else 0.0
        ttft = wait + queue + shared + self.prefill_s(exit_layer, num_prompt_tokens)
        ttft, tpot = ttft * self.safety, tpot * self.safety
        return Estimate(ttft_s=ttft, tpot_s=tpot, e2e_s=ttft + (max_tokens - 1) * tpot)

    def _decode_s(
        self, cap: int, counts: Mapping[int, int], load: Load, exit_layer: int, context: int
    ) -> float:
        rows = []
        for e, count in counts.items():
            if e <= cap:
                mean = round(load.mean_context)
                rows += [RowShape(e, 1, mean, samples=True)] * (count - (e == exit_layer))
        if exit_layer <= cap:
            rows.append(RowShape(exit_layer, 1, context, samples=True))
        return self.step_s(StepShape.of(rows))


def _fit_line(samples: Sequence[tuple[StepShape, float]]) -> tuple[float, ...]:
    """Non-negative least squares on relative errors, by dropping the most negative column."""
    times = np.array([seconds for _, seconds in samples])
    features = np.array([shape.features for shape, _ in samples])
    scale = np.maximum(features.max(axis=0), 1e-12)
    weighted = features / scale / times[:, None]
    active = list(range(features.shape[1]))
    while True:
        solution, *_ = np.linalg.lstsq(weighted[:, active], np.ones(len(times)), rcond=None)
        if len(active) == 1 or solution.min() >= 0:
            break
        active.pop(int(solution.argmin()))
    line = np.zeros(features.shape[1])
    line[active] = np.maximum(solution, 0.0)
    return tuple(float(c) for c in line / scale)
