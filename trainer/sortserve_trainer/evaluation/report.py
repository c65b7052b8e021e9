"""The result of an evaluation, and the forms it is written in.

The score of exit E is ``exp(loss_L - loss_E)``, at most 1, with L the full depth: the geometric
mean over target tokens of the probability the exit gives to a token, relative to the full depth's.
With several files it is the geometric mean of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from sortserve.checkpoint.sorted_json import MeasuredSchedule
from sortserve.core.schedule import DepthSchedule
from sortserve_trainer.evaluation.answering import AnswerQuality, Fluency
from sortserve_trainer.evaluation.likelihood import Likelihood
from sortserve_trainer.evaluation.usable import is_usable

__all__ = [
    "Measured",
    "ModelReport",
    "Report",
    "Sample",
    "ScheduleReport",
    "details",
    "summarise",
]

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Raw results of one exit or schedule, by file."""

    likelihoods: dict[str, Likelihood] = field(default_factory=dict)
    answers: dict[str, AnswerQuality] = field(default_factory=dict)
    fluencies: dict[str, Fluency] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One answer, to be read by people."""

    prompt: str
    text: str
    ended: bool


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """One sub-model: an exit, or the base at full depth."""

    exit_layer: int
    compute: float
    """FLOPs per token relative to the full model, head included."""
    num_parameters: int
    metrics: dict[str, float]
    """Means over files, each file counting alike."""
    by_file: dict[str, dict[str, float]]
    """The same of each file, with the number of tokens, questions or prompts."""
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScheduleReport:
    """One depth schedule; what is not said here is as of an exit."""

    schedule: DepthSchedule
    compute: float
    """Mean FLOPs per token relative to the full model, over the targets of all --data files alike;
    without one, over an answer of ``SCHEDULE_TOKENS`` tokens."""
    metrics: dict[str, float]
    by_file: dict[str, dict[str, float]]
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that one evaluation found."""

    model: str
    """Its name."""
    base: str | None
    """Name of what it was compared with."""
    settings: dict[str, Any]
    """What changes the numbers: limits, lengths, seed, dtype, device."""
    files: list[dict[str, Any]]
    """Name, kind, rows and sha256 of each file."""
    versions: dict[str, str]
    exits: tuple[ModelReport, ...]
    """Shallowest first; the last is the full depth."""
    schedules: tuple[ScheduleReport, ...] = ()
    """In the order in which they were named."""
    base_report: ModelReport | None = None

    def document(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        schedules = [
            {**asdict(entry), "schedule": entry.schedule.document} for entry in self.schedules
        ]
        own = {"usable": self.usable(), "schedules": schedules}
        return {"format_version": FORMAT_VERSION, **asdict(self), **own}

    def quality(self) -> dict[int, dict[str, float]]:
        """What ``sorted.json`` keeps: the metrics, and of several --data files each one's loss."""
        return {exit_.exit_layer: _kept(exit_) for exit_ in self.exits}

    def schedule_quality(self) -> tuple[MeasuredSchedule, ...]:
        """The same of each schedule."""
        return tuple(MeasuredSchedule(entry.schedule, _kept(entry)) for entry in self.schedules)

    def usable(self) -> dict[int, bool]:
        """Exit layer to whether it is fit to be used; exits that were not judged are left out."""
        full = self.exits[-1].metrics
        verdicts = {exit_.exit_layer: is_usable(exit_.metrics, full) for exit_ in self.exits}
        return {layer: verdict for layer, verdict in verdicts.items() if verdict is not None}


def summarise(measured: Measured, full: Measured | None) -> dict[str, float]:
    """The metrics of one exit over all files.

    Args:
        measured: of the exit.
        full: of the full depth of the same model, which the score is relative to; None leaves the
            score, the agreement and the KL out.
    """
    metrics: dict[str, float] = {}
    likelihoods = list(measured.likelihoods.values())
    if likelihoods:
        loss = fmean(item.loss for item in likelihoods)
        if full is not None:
            full_loss = fmean(item.loss for item in full.likelihoods.values())
            metrics["score"] = min(1.0, math.exp(full_loss - loss))
        metrics["loss"] = loss
        metrics["perplexity"] = perplexity(loss)
        if full is not None:
            metrics["agreement"] = fmean(item.agreement for item in likelihoods)
            metrics["kl"] = fmean(item.kl for item in likelihoods)
    metrics |= _means(measured.answers.values(), ("exact_match", "f1", "contains"))
    names = ("repetition", "loop_rate", "mean_tokens", "ended")
    return metrics | _means(measured.fluencies.values(), names)


def details(measured: Measured, *, has_full: bool) -> dict[str, dict[str, float]]:
    """Every number of every file; ``has_full`` as ``full`` of ``summarise``."""
    found: dict[str, dict[str, float]] = {}
    for name, item in measured.likelihoods.items():
        found[name] = {
            "loss": item.loss,
            "perplexity": perplexity(item.loss),
            **({"agreement": item.agreement, "kl": item.kl} if has_full else {}),
            "num_tokens": item.num_tokens,
        }
    parts: Sequence[Mapping[str, AnswerQuality | Fluency]] = (measured.answers, measured.fluencies)
    for part in parts:
        for name, quality in part.items():
            found[name] = {**found.get(name, {}), **asdict(quality)}
    return found


def perplexity(loss: float) -> float:
    """``exp(loss)``; a loss beyond what a float can hold gives its largest value."""
    return math.exp(min(loss, 700.0))


def _means(items: Iterable[AnswerQuality | Fluency], names: Sequence[str]) -> dict[str, float]:
    items = list(items)
    return {name: fmean(getattr(item, name) for item in items) for name in names if items}


def _kept(entry: ModelReport | ScheduleReport) -> dict[str, float]:
    metrics = {**entry.metrics, **_losses_by_file(entry)}
    return {name: round(value, 6) for name, value in metrics.items()}


def _losses_by_file(exit_: ModelReport | ScheduleReport) -> dict[str, float]:
    losses = {n: metrics["loss"] for n, metrics in exit_.by_file.items() if "loss" in metrics}
    return {f"loss/{n}": loss for n, loss in losses.items()} if len(losses) > 1 else {}
