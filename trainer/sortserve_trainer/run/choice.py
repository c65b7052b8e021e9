"""Which evaluation was the best, and whether training has been without a better one too long.

Decided from the log alone, so that a run that is resumed decides as it would have (no torch).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sortserve.core.errors import ConfigError

__all__ = ["Choice", "Evaluation", "best_of", "evaluations", "metric_name", "should_stop"]

PREFIX = "eval_"
DEFAULT_METRIC = "loss_mean"


@dataclass(frozen=True)
class Evaluation:
    """What one was like; less is better."""

    step: int
    value: float


def metric_name(asked: str | None, exits: Sequence[int]) -> str:
    """The name of a metric in the log.

    Args:
        asked: with or without ``eval_``, as transformers takes it; None is the mean of all exits.
        exits: that there are.

    Raises:
        ConfigError: there is none of this name.
    """
    names = ["loss", DEFAULT_METRIC, *(f"loss_exit_{e}" for e in exits)]
    name = (asked or DEFAULT_METRIC).removeprefix(PREFIX)
    if name not in names:
        raise ConfigError(
            f"--metric-for-best-model {asked!r} is not allowed: choose one of {', '.join(names)}.",
            param="metric-for-best-model",
        )
    return f"{PREFIX}{name}"


def evaluations(log_history: Iterable[Mapping[str, Any]], metric: str) -> list[Evaluation]:
    """Those in the log of transformers' Trainer, one for each step that has some."""
    by_step = {int(logs["step"]): float(logs[metric]) for logs in log_history if metric in logs}
    return [Evaluation(step, value) for step, value in sorted(by_step.items())]


def best_of(found: Iterable[Evaluation]) -> Evaluation | None:
    """The first with the least value; not a number is never better than one that is."""
    known = list(found)
    numbers = [evaluation for evaluation in known if not math.isnan(evaluation.value)]
    return min(numbers or known[:1], key=lambda evaluation: evaluation.value, default=None)


def should_stop(found: Iterable[Evaluation], patience: int | None, threshold: float) -> bool:
    """As transformers' ``EarlyStoppingCallback`` has it.

    Args:
        found: all evaluations so far.
        patience: evaluations in a row that are no better than the best by ``threshold`` after which
            training ends; None never ends it.
        threshold: see ``patience``.
    """
    if patience is None:
        return False
    best, num_worse = float("inf"), 0
    for evaluation in found:
        if evaluation.value < best - threshold:
            best, num_worse = evaluation.value, 0
        else:
            num_worse += 1
        if num_worse >= patience:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a run makes of its evaluations."""

    metric: str
    """Its name in the log."""
    keeps_best: bool
    """Whether the weights of the best evaluation are kept, not the last ones."""
    patience: int | None = None
    threshold: float = 0.0

    def best(self, log_history: Iterable[Mapping[str, Any]]) -> int | None:
        """The step whose weights are kept; None where the last ones are, or nothing is known."""
        best = best_of(evaluations(log_history, self.metric)) if self.keeps_best else None
        return None if best is None else best.step

    def is_over(self, log_history: Iterable[Mapping[str, Any]]) -> bool:
        """Whether training has been without a better one too long."""
        found = evaluations(log_history, self.metric)
        return should_stop(found, self.patience, self.threshold)
