"""Everything that is measured about one model."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from sortserve.checkpoint.load import (
    exit_table,
    load_checkpoint,
)
from sortserve.checkpoint.sources import resolve_source
from sortserve.core.budget import ExitTable
from sortserve.core.errors import CheckpointError, ConfigError
from sortserve.core.schedule import DepthSchedule
from sortserve.model.config import ModelConfig
from sortserve_trainer.evaluation.answering import (
    Answer,
    Answerer,
    has_ended,
    measure_answers,
    measure_fluency,
)
from sortserve_trainer.evaluation.display import Display
from sortserve_trainer.evaluation.files import HeldOut, load_packs
from sortserve_trainer.evaluation.likelihood import measure_likelihood
from sortserve_trainer.evaluation.report import Measured, Sample
from sortserve_trainer.evaluation.settings import EvalSettings
from sortserve_trainer.model.load import LoadedModel, load_for_evaluation

__all__ = ["Depth", "Result", "Subject", "measure"]

Depth = int | DepthSchedule
"""An exit, or an exit for each part of an answer."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is measured."""

    name: str
    source: str
    """As ``sortserve serve`` takes it."""
    revision: str | None = None
    exits: tuple[int, ...] | None = None
    """None: those of its sorted.json."""
    only_full: bool = False

    @classmethod
    def find(cls, source: str, revision: str | None = None, **fields: Any) -> Subject:
        """A subject by the name it would be served under.

        Raises:
            CheckpointError: there is no such model.
            ConfigError: a revision that is not possible.
        """
        name = resolve_source(source, revision=revision).name
        return cls(name=name, source=source, revision=revision, **fields)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found about one model."""

    table: ExitTable
    measured: dict[int, Measured]
    """By exit layer, shallowest first."""
    schedules: dict[DepthSchedule, Measured]
    """In the order in which they were named."""
    samples: dict[Depth, tuple[Sample, ...]]
    base: str | None
    """What it was trained from; None where it is a base itself."""
    dtype: str
    device: str


def measure(
    subject: Subject, settings: EvalSettings, held_out: HeldOut, display: Display
) -> Result:
    """Every exit of a model on every file.

    Raises:
        CheckpointError: the model is bad or not supported, or a loss is not a number.
        ConfigError: it does not have the exits, a --data file is bad, or a prompt is too long.
    """
    loaded = load_for_evaluation(
        subject.source,
        exits=subject.exits,
        dtype=settings.dtype,
        device=settings.device,
        quantize=settings.quantize,
        revision=subject.revision,
    )
    model = loaded.model
    if subject.only_full:
        model.exits = model.exits[-1:]
    exits = model.exits
    measured = {exit_layer: Measured() for exit_layer in exits}
    schedules = {} if subject.only_full else {s: Measured() for s in settings.schedule}
    _check_schedules(schedules, exits)
    _add_likelihoods(measured, schedules, subject, settings, held_out, loaded, display)
    result = Result(
        table=exit_table(loaded.config, loaded.sorted_info, exits),
        measured=measured,
        schedules=schedules,
        samples={},
        base=_trained_from(subject, loaded),
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device.type,
    )
    del loaded, model
    gc.collect()  # the engine has weights of its own
    if held_out.questions or held_out.prompts:
        everything: list[tuple[Depth, Measured]] = [*measured.items(), *schedules.items()]
        samples = _add_answers(dict(everything), subject, settings, held_out, display)
        result = replace(result, samples=samples)
    return result


def _check_schedules(schedules: Iterable[DepthSchedule], exits: Sequence[int]) -> None:
    """Refuse exits that are not measured."""
    for schedule in schedules:
        for exit_layer in schedule.exits:
            if exit_layer not in exits:
                raise ConfigError(
                    f"--schedule: {schedule} names exit {exit_layer}, which is not measured: the "
                    f"exits are {', '.join(map(str, exits))}.",
                    param="schedule",
                )


def _trained_from(subject: Subject, loaded: LoadedModel) -> str | None:
    """The base a checkpoint names, findable from here."""
    own = resolve_source(subject.source, revision=subject.revision).reference
    if loaded.base != own:
        return loaded.base
    if loaded.sorted_info is None:
        return None
    # It has all weights itself; its recipe may tell what they were before.
    recorded = loaded.sorted_info.recipe.get("settings")
    named = recorded.get("base") if isinstance(recorded, dict) else None
    return named if isinstance(named, str) else None


# Text


def _add_likelihoods(
    measured: Mapping[int, Measured],
    schedules: Mapping[DepthSchedule, Measured],
    subject: Subject,
    settings: EvalSettings,
    held_out: HeldOut,
    loaded: LoadedModel,
    display: Display,
) -> None:
    max_length = min(settings.max_length, _context(loaded.config))
    # All files first: the last may have a bad row.
    packs = {
        name: load_packs(reference, loaded.tokenizer, settings, max_length=max_length)
        for name, reference in held_out.data.items()
    }
    for name, own in packs.items():
        with display.phase(f"{subject.name}: likelihood of {name}", len(own)) as advance:
            found = measure_likelihood(
                loaded.model,
                own,
                advance,
                quantize=loaded.quantize,
                schedules=tuple(schedules),
            )
        for schedule, likelihood in found.schedules.items():
            schedules[schedule].likelihoods[name] = likelihood
        for exit_layer, likelihood in found.exits.items():
            if not math.isfinite(likelihood.loss):
                raise CheckpointError(
                    f"{subject.name}: the loss of exit {exit_layer} on {name} is "
                    f"{likelihood.loss}: its weights are broken."
                )
            measured[exit_layer].likelihoods[name] = likelihood


def _context(config: ModelConfig) -> int:
    """Most tokens of an example; beyond a sliding window attention would have to be cut."""
    longest = config.max_position_embeddings
    return min(longest, config.sliding_window or longest)


# Answers


def _add_answers(
    measured: Mapping[Depth, Measured],
    subject: Subject,
    settings: EvalSettings,
    held_out: HeldOut,
    display: Display,
) -> dict[Depth, tuple[Sample, ...]]:
    """Let every exit and schedule answer everything; returns the answers that the report quotes.

    Args:
        measured: gets what is found.
        subject: the model.
        settings: limits and lengths.
        held_out: questions and prompts.
        display: told of every answer.
    """
    asked = {
        name: [_ask(question.text, settings.qa_instruction) for question in questions]
        for name, questions in held_out.questions.items()
    }
    prompted = {n: [prompt.text for prompt in prompts] for n, prompts in held_out.prompts.items()}
    messages = [m for part in (asked, prompted) for group in part.values() for m in group]
    samples: dict[Depth, tuple[Sample, ...]] = {}
    with closing(_answerer(list(measured), subject, settings, messages)) as answerer:
        for depth, own in measured.items():
            ask = _Asking(answerer, depth, f"{subject.name}, exit {depth}", display)
            quoted: list[Sample] = []
            for name, texts in asked.items():
                answers = ask(texts, f"questions of {name}", settings.qa_max_tokens)
                own.answers[name] = measure_answers(held_out.questions[name], answers)
            for name, texts in prompted.items():
                answers = ask(texts, f"prompts of {name}", settings.max_tokens)
                own.fluencies[name] = measure_fluency(answers)
                quoted += [
                    Sample(text, answer.text, has_ended(answer))
                    for text, answer in zip(texts, answers, strict=True)
                ]
            samples[depth] = tuple(quoted[: settings.samples])
    return samples


@dataclass(frozen=True)
class _Asking:
    """One exit or schedule that answers, shown while it does."""

    answerer: Answerer
    depth: Depth
    name: str
    display: Display

    def __call__(self, messages: Sequence[str], what: str, max_tokens: int) -> list[Answer]:
        with self.display.phase(f"{self.name}: {what}", len(messages)) as advance:
            return self.answerer.answer(
                messages, depth=self.depth, max_tokens=max_tokens, on_answer=advance
            )


def _answerer(
    depths: Sequence[Depth], subject: Subject, settings: EvalSettings, messages: Sequence[str]
) -> Answerer:
    """What answers at all of these depths."""
    checkpoint = load_checkpoint(
        subject.source,
        exits=[depth for depth in depths if isinstance(depth, int)],
        dtype=settings.dtype,
        device=settings.device,
        quantize=settings.quantize,
        revision=subject.revision,
    )
    longest = max(
        settings.max_tokens if settings.prompts else 1,
        settings.qa_max_tokens if settings.qa else 1,
    )
    return Answerer(checkpoint, messages, max_tokens=longest, max_num_seqs=settings.batch_size)


def _ask(question: str, instruction: str) -> str:
    return f"{question}\n{instruction}" if instruction else question
