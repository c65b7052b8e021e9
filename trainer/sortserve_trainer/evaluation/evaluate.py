"""One evaluation, from its settings to its report."""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortserve.budget import ExitTable
from sortserve.checkpoint import exit_table, load_checkpoint
from sortserve.errors import CheckpointError, ConfigError, SortserveError
from sortserve.model.config import ModelConfig
from sortserve.model.sorted_json import SORTED_JSON, SortedInfo
from sortserve.model.sources import resolve_source
from sortserve_trainer.evaluation.answering import (
    Answerer,
    has_ended,
    measure_answers,
    measure_fluency,
)
from sortserve_trainer.evaluation.display import Display
from sortserve_trainer.evaluation.files import HeldOut, load_packs, read_held_out
from sortserve_trainer.evaluation.likelihood import measure_likelihood
from sortserve_trainer.evaluation.report import (
    Measured,
    ModelReport,
    Report,
    Sample,
    details,
    summarise,
)
from sortserve_trainer.evaluation.settings import EvalSettings
from sortserve_trainer.load import LoadedModel, load_for_evaluation
from sortserve_trainer.recipe import versions

__all__ = ["evaluate", "write_quality"]

logger = logging.getLogger(__name__)

_SETTINGS_THAT_COUNT = {
    "limit_tokens",
    "limit_rows",
    "seed",
    "max_length",
    "max_tokens",
    "qa_max_tokens",
    "qa_instruction",
}


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model that is measured."""

    name: str
    source: str
    revision: str | None
    exits: tuple[int, ...] | None = None
    """None: those of its sorted.json."""
    only_full: bool = False

    @classmethod
    def find(cls, source: str, revision: str | None = None, **fields: Any) -> _Subject:
        name = resolve_source(source, revision=revision).name
        return cls(name=name, source=source, revision=revision, **fields)


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What was found about one model."""

    table: ExitTable
    measured: dict[int, Measured]
    samples: dict[int, tuple[Sample, ...]]
    base: str | None
    """What it was trained from, if it is not that itself."""
    dtype: str
    device: str


def evaluate(settings: EvalSettings, display: Display | None = None) -> Report:
    """Measure every exit of a model, and its base at full depth.

    Raises:
        ConfigError: a setting or a file is wrong; one line says which and why.
        CheckpointError: the model or the base is bad or not supported, or a loss is no number.
    """
    display = display or Display()
    held_out = read_held_out(settings)
    subject = _Subject.find(settings.model, settings.revision, exits=settings.exits)
    result = _measure(subject, settings, held_out, display)
    full = result.measured[result.table.full]
    base, base_report = _measure_base(settings, result.base, held_out, display)
    return Report(
        model=subject.name,
        base=base,
        settings={
            **settings.model_dump(mode="json", include=_SETTINGS_THAT_COUNT),
            "dtype": result.dtype,
            "device": result.device,
        },
        files=held_out.described,
        versions=versions(),
        exits=_model_reports(result, full),
        base_report=base_report,
    )


def write_quality(report: Report, model: str) -> str:
    """Put the report into ``sorted.json`` as ``quality``, in one atomic step.

    Args:
        report: of ``model``.
        model: as the user named it.

    Returns:
        One line that says what was done, or why nothing was.

    Raises:
        ConfigError: ``sorted.json`` cannot be written.
        CheckpointError: it is no longer valid.
    """
    folder = Path(model).expanduser()
    info = SortedInfo.read(folder) if folder.is_dir() else None
    if info is None:
        return f"{report.model} has no {SORTED_JSON} here: the result is not written into it."
    quality = report.quality()
    missing = [exit_layer for exit_layer in info.exits if exit_layer not in quality]
    path = folder / SORTED_JSON
    if missing:
        left_out = ", ".join(map(str, missing))
        return f"{path} is left as it is: exits {left_out} were not measured."
    kept = {exit_layer: quality[exit_layer] for exit_layer in info.exits}
    document = {**info.model_dump(), "quality": kept}
    try:
        SortedInfo.model_validate(document).write(folder)
    except OSError as error:
        path.with_suffix(".json.tmp").unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    return f"{path} has the result as quality."


# One model


def _measure(
    subject: _Subject, settings: EvalSettings, held_out: HeldOut, display: Display
) -> _Result:
    loaded = load_for_evaluation(
        subject.source,
        exits=subject.exits,
        dtype=settings.dtype,
        device=settings.device,
        revision=subject.revision,
    )
    model = loaded.model
    if subject.only_full:
        model.exits = model.exits[-1:]
    exits = model.exits
    # An exit with a head of its own (sft+ict) is none that the engine could serve.
    answering = [e for e in exits if str(e) not in model.exit_heads]
    table = exit_table(loaded.config, loaded.sorted_info, exits)
    measured = {exit_layer: Measured() for exit_layer in exits}
    samples: dict[int, tuple[Sample, ...]] = {}
    _add_likelihoods(measured, subject, settings, held_out, loaded, display)
    dtype, device = str(loaded.dtype).removeprefix("torch."), loaded.device.type
    base = _trained_from(subject, loaded)
    del loaded, model
    gc.collect()  # the engine has weights of its own
    if held_out.questions or held_out.prompts:
        samples = _add_answers(measured, answering, subject, settings, held_out, display)
    return _Result(
        table=table, measured=measured, samples=samples, base=base, dtype=dtype, device=device
    )


def _add_likelihoods(
    measured: dict[int, Measured],
    subject: _Subject,
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
            found = measure_likelihood(loaded.model, own, advance)
        for exit_layer, likelihood in found.items():
            if not math.isfinite(likelihood.loss):
                raise CheckpointError(
                    f"{subject.name}: the loss of exit {exit_layer} on {name} is "
                    f"{likelihood.loss}: its weights are broken."
                )
            measured[exit_layer].likelihoods[name] = likelihood


def _add_answers(
    measured: dict[int, Measured],
    exits: list[int],
    subject: _Subject,
    settings: EvalSettings,
    held_out: HeldOut,
    display: Display,
) -> dict[int, tuple[Sample, ...]]:
    """Let every exit answer everything; returns the answers that the report quotes."""
    checkpoint = load_checkpoint(
        subject.source,
        exits=exits,
        dtype=settings.dtype,
        device=settings.device,
        revision=subject.revision,
    )
    asked = {
        name: [_ask(question.text, settings.qa_instruction) for question in questions]
        for name, questions in held_out.questions.items()
    }
    prompted = {n: [prompt.text for prompt in prompts] for n, prompts in held_out.prompts.items()}
    answerer = Answerer(
        checkpoint,
        [message for part in (asked, prompted) for group in part.values() for message in group],
        max_tokens=max(
            settings.max_tokens if prompted else 1, settings.qa_max_tokens if asked else 1
        ),
        max_num_seqs=settings.batch_size,
    )
    samples: dict[int, list[Sample]] = {exit_layer: [] for exit_layer in exits}
    for exit_layer in exits:
        where = f"{subject.name}, exit {exit_layer}"
        for name, messages in asked.items():
            with display.phase(f"{where}: questions of {name}", len(messages)) as advance:
                answers = answerer.answer(
                    messages,
                    exit_layer=exit_layer,
                    max_tokens=settings.qa_max_tokens,
                    on_answer=advance,
                )
            measured[exit_layer].answers[name] = measure_answers(held_out.questions[name], answers)
        for name, messages in prompted.items():
            with display.phase(f"{where}: prompts of {name}", len(messages)) as advance:
                answers = answerer.answer(
                    messages,
                    exit_layer=exit_layer,
                    max_tokens=settings.max_tokens,
                    on_answer=advance,
                )
            measured[exit_layer].fluencies[name] = measure_fluency(answers)
            samples[exit_layer] += [
                Sample(messages[answer.index], answer.text, has_ended(answer)) for answer in answers
            ]
    return {e: tuple(answers[: settings.samples]) for e, answers in samples.items()}


def _ask(question: str, instruction: str) -> str:
    return f"{question}\n{instruction}" if instruction else question


def _context(config: ModelConfig) -> int:
    """Most tokens of an example; beyond a sliding window attention would have to be cut."""
    return min(
        config.max_position_embeddings, config.sliding_window or config.max_position_embeddings
    )


def _model_reports(result: _Result, full: Measured | None) -> tuple[ModelReport, ...]:
    return tuple(
        ModelReport(
            exit_layer=exit_layer,
            compute=result.table[exit_layer].compute,
            num_parameters=result.table[exit_layer].num_parameters,
            metrics=summarise(measured, full),
            by_file=details(measured, has_full=full is not None),
            samples=result.samples.get(exit_layer, ()),
        )
        for exit_layer, measured in result.measured.items()
    )


# The base


def _trained_from(subject: _Subject, loaded: LoadedModel) -> str | None:
    """The base a checkpoint names, findable from here; None where it is a base itself."""
    own = resolve_source(subject.source, revision=subject.revision).reference
    if loaded.base != own:
        return loaded.base
    if loaded.sorted_info is None:
        return None
    # It has all weights itself; its recipe may tell what they were before.
    recorded = loaded.sorted_info.recipe.get("settings")
    named = recorded.get("base") if isinstance(recorded, dict) else None
    return named if isinstance(named, str) else None


def _measure_base(
    settings: EvalSettings, trained_from: str | None, held_out: HeldOut, display: Display
) -> tuple[str | None, ModelReport | None]:
    """Name and report of the base; a base that nobody asked for by name may be missing."""
    source = trained_from if settings.base == "auto" else settings.base
    if source is None or settings.base == "none":
        return None, None
    try:
        subject = _Subject.find(source, only_full=True)
        (report,) = _model_reports(_measure(subject, settings, held_out, display), None)
    except SortserveError as error:
        if settings.base != "auto":
            raise
        logger.warning("The base is not measured: %s", error.message)
        return None, None
    return subject.name, report
