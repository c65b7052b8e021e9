"""Quality against compute, one point per exit, as SVG and PNG; schedules are hollow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sortserve.process.plot import COLOURS, new_figure, render
from sortserve_trainer.evaluation.report import ModelReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_quality"]

_SHARES = {
    "score": ("score", "#1b6ca8", "o"),
    "agreement": ("agreement with the full depth", "#d1495b", "s"),
    "f1": ("F1 of answers", "#5b8e3f", "^"),
    "repetition": ("repeated 4-grams", "#8d6a9f", "v"),
}
"""Label, colour and marker of the metrics that lie in [0, 1]."""


def draw_quality(report: Report) -> dict[str, bytes]:
    """The plot of a report: ``svg`` and ``png`` to the bytes of the file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    panels: list[Callable[[Axes, Report], None]] = []
    if any(name in report.exits[-1].metrics for name in _SHARES):
        panels.append(_draw_shares)
    if "loss" in report.exits[-1].metrics:
        panels.append(_draw_losses)
    with new_figure(5.2 * len(panels), 3.8) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, draw in zip(axes, panels, strict=True):
            draw(axis, report)
            _mark_exits(axis, report)
        figure.suptitle(f"{report.model}: quality of each exit against its compute", fontsize=10)
        return {format_: render(figure, format_) for format_ in ("svg", "png")}


def _draw_shares(axis: Axes, report: Report) -> None:
    for name, (label, colour, marker) in _SHARES.items():
        points = [(e.compute, e.metrics[name]) for e in report.exits if name in e.metrics]
        if points:
            axis.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label)
        for entry in report.schedules:
            if name in entry.metrics:
                axis.plot(entry.compute, entry.metrics[name], marker, color=colour, mfc="white")
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("share")
    axis.legend()


def _draw_losses(axis: Axes, report: Report) -> None:
    for i, name in enumerate(_files_with_loss(report.exits[-1])):
        colour = COLOURS[i % len(COLOURS)]
        points = [(e.compute, e.by_file[name]["loss"]) for e in report.exits]
        axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
        for entry in report.schedules:
            axis.plot(entry.compute, entry.by_file[name]["loss"], "o", color=colour, mfc="white")
        if report.base_report is not None and name in report.base_report.by_file:
            base = report.base_report.by_file[name]["loss"]
            axis.axhline(base, color=colour, linestyle=":", linewidth=1)
    if report.base_report is not None:
        axis.plot([], [], color="#555555", linestyle=":", linewidth=1, label="base, full depth")
    axis.set_ylabel("loss (nats per token)")
    axis.set_ylim(bottom=0)
    axis.legend()


def _mark_exits(axis: Axes, report: Report) -> None:
    """Compute below, exit layers above."""
    axis.set_xlabel("compute per token, relative to the full model")
    shallowest = report.exits[0].compute
    axis.set_xlim(max(0.0, min(0.9, shallowest) - 0.1), 1.03)
    top = axis.secondary_xaxis("top")
    top.set_xticks([e.compute for e in report.exits], [str(e.exit_layer) for e in report.exits])
    top.set_xlabel("exit layer")


def _files_with_loss(exit_: ModelReport) -> list[str]:
    return [name for name, metrics in exit_.by_file.items() if "loss" in metrics]
