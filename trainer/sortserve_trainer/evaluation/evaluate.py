"""One evaluation, from its settings to its report."""

from __future__ import annotations

import logging
from statistics import fmean

from sortserve.checkpoint.exit_table import SCHEDULE_TOKENS
from sortserve.core.budget import ExitTable
from sortserve.core.errors import SortserveError
from sortserve.core.schedule import DepthSchedule
from sortserve_trainer.evaluation.display import Display
from sortserve_trainer.evaluation.files import HeldOut, read_held_out
from sortserve_trainer.evaluation.measure import Result, Subject, measure
from sortserve_trainer.evaluation.report import (
    Measured,
    ModelReport,
    Report,
    ScheduleReport,
    details,
    summarise,
)
from sortserve_trainer.evaluation.settings import EvalSettings
from sortserve_trainer.run.recipe import versions

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)

_SETTINGS_THAT_COUNT = {
    "limit_tokens",
    "limit_rows",
    "seed",
    "max_length",
    "max_tokens",
    "qa_max_tokens",
    "qa_instruction",
    "quantize",
}


def evaluate(settings: EvalSettings, display: Display | None = None) -> Report:
    """Measure every exit of a model, and its base at full depth.

    Args:
        settings: what to measure, on what, and how much.
        display: shown how far it is; by default on standard error.

    Raises:
        ConfigError: a setting or a file is wrong; one line says which and why.
        CheckpointError: the model or the base is bad or not supported, or a loss is no number.
    """
    display = display or Display()
    held_out = read_held_out(settings)
    subject = Subject.find(settings.model, settings.revision, exits=settings.exits)
    result = measure(subject, settings, held_out, display)
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
        exits=_model_reports(result, result.measured[result.table.full]),
        schedules=_schedule_reports(result),
        base_report=base_report,
    )


def _measure_base(
    settings: EvalSettings, trained_from: str | None, held_out: HeldOut, display: Display
) -> tuple[str | None, ModelReport | None]:
    """Name and report of the base; a base that nobody asked for by name may be missing."""
    source = trained_from if settings.base == "auto" else settings.base
    if source is None or settings.base == "none":
        return None, None
    try:
        subject = Subject.find(source, only_full=True)
        (report,) = _model_reports(measure(subject, settings, held_out, display), None)
    except SortserveError as error:
        if settings.base != "auto":
            raise
        logger.warning("The base is not measured: %s", error.message)
        return None, None
    return subject.name, report


def _model_reports(result: Result, full: Measured | None) -> tuple[ModelReport, ...]:
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


def _schedule_reports(result: Result) -> tuple[ScheduleReport, ...]:
    full = result.measured[result.table.full]
    return tuple(
        ScheduleReport(
            schedule=schedule,
            compute=_mean_compute(schedule, measured, result.table),
            metrics=summarise(measured, full),
            by_file=details(measured, has_full=True),
            samples=result.samples.get(schedule, ()),
        )
        for schedule, measured in result.schedules.items()
    )


def _mean_compute(schedule: DepthSchedule, measured: Measured, table: ExitTable) -> float:
    """Over the targets of each --data file, and over the files; else over a typical answer."""
    means = [
        sum(table[e].compute * count for e, count in found.tokens_by_exit.items())
        / found.num_tokens
        for found in measured.likelihoods.values()
    ]
    return fmean(means) if means else schedule.mean(lambda e: table[e].compute, SCHEDULE_TOKENS)
