"""A report as tables in the terminal, narrow enough for 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich import box
from rich.table import Table

from sortserve_trainer.evaluation.report import ModelReport, Report, ScheduleReport

__all__ = ["quality_tables"]

_Columns = Mapping[str, tuple[str, Callable[[float], str]]]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


_TEXT: _Columns = {
    "score": ("score", "{:.3f}".format),
    "loss": ("loss", "{:.3f}".format),
    "perplexity": ("perplexity", _perplexity),
    "agreement": ("agreement", _percent),
    "kl": ("KL", "{:.3f}".format),
}
_QUESTIONS: _Columns = {
    "exact_match": ("exact match", _percent),
    "f1": ("F1", _percent),
    "contains": ("contains", _percent),
}
_PROMPTS: _Columns = {
    "repetition": ("repetition", _percent),
    "loop_rate": ("loops", _percent),
    "mean_tokens": ("tokens", "{:.0f}".format),
    "ended": ("ended", _percent),
}


def quality_tables(report: Report) -> list[Table]:
    """Held-out text, questions and prompts: a table of each that was measured.

    One row per exit, shallowest first, then schedules and the base; one column per metric measured.
    """
    measured = {name for exit_ in report.exits for name in exit_.metrics}
    tables = []
    parts = {"held-out text": _TEXT, "questions": _QUESTIONS, "prompts": _PROMPTS}
    for part, all_columns in parts.items():
        columns = {name: column for name, column in all_columns.items() if name in measured}
        if columns:
            tables.append(_table(f"{_name(report)}, {part}", report, columns))
    return tables


def _name(report: Report) -> str:
    quantize = report.settings.get("quantize", "none")
    return report.model if quantize == "none" else f"{report.model} in {quantize}"


def _table(name: str, report: Report, columns: _Columns) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=name, title_justify="left")
    table.add_column("exit", justify="right", overflow="fold")
    for title in ("compute", *(title for title, _ in columns.values())):
        table.add_column(title, justify="right", no_wrap=True)
    for exit_ in report.exits:
        table.add_row(*_cells(str(exit_.exit_layer), exit_, columns))
    if report.schedules:
        table.add_section()
    for entry in report.schedules:
        table.add_row(*_cells(str(entry.schedule), entry, columns))
    if report.base_report is not None:
        table.add_section()
        table.add_row(*_cells("base", report.base_report, columns))
    return table


def _cells(title: str, exit_: ModelReport | ScheduleReport, columns: _Columns) -> list[str]:
    values = [
        format_(exit_.metrics[name]) if name in exit_.metrics else ""
        for name, (_, format_) in columns.items()
    ]
    return [title, _percent(exit_.compute), *values]
