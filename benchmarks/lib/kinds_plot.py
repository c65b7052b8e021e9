"""The plot that decides between kinds of exit modules: quality against measured step time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sortserve.process.plot import COLOURS, new_figure, render

__all__ = ["draw_kinds"]


def draw_kinds(results: Sequence[Mapping[str, Any]], format_: str) -> bytes:
    """A line for each kind, a point for each exit, whose layers stand beside it.

    Args:
        results: entries of ``benchmarks.exit_kinds``, with measured steps.
        format_: ``svg`` or ``png``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    by_kind: dict[str, list[tuple[float, float, int]]] = {}
    for entry in results:
        above = statistics.fmean(entry["above_full"].values())
        point = (100 * entry["step_of_full"], 100 * above, entry["exit_layer"])
        by_kind.setdefault(entry["kind"], []).append(point)
    with new_figure(6.0, 4.2) as figure:
        axes = figure.subplots()
        for colour, (kind, points) in zip(COLOURS, by_kind.items(), strict=False):
            times, losses, _ = zip(*sorted(points), strict=True)
            axes.plot(times, losses, "o-", color=colour, label=kind)
            for time, loss, exit_layer in points:
                axes.annotate(str(exit_layer), (time, loss), (5, 4), textcoords="offset points")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("measured decode step, % of the full depth's")
        axes.set_ylabel("loss above the full depth's, %, mean over the files")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return render(figure, format_)
