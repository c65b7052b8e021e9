"""Drawings in one style, the same bytes for the same figures; matplotlib is loaded on use."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Series", "line_chart", "new_figure", "render"]

COLOURS = ("#1b6ca8", "#d1495b", "#5b8e3f", "#8d6a9f", "#c77d2a", "#3d8b8b")
_STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sortserve",
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure, in inches; draw and render it in the block, where the style holds.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def render(figure: Figure, format_: str, *, dpi: int = 160) -> bytes:
    """The file's content, as ``svg`` or ``png`` (of so many dots an inch), without a date."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if format_ == "svg" else {"Software": None}
    figure.savefig(buffer, format=format_, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


@dataclass(frozen=True)
class Series:
    """One line, or one cloud of dots."""

    name: str
    """In the legend; empty: not there."""
    points: Sequence[tuple[float, float]]
    colour: int
    """Index into ``COLOURS``, which begin anew after the last."""
    dots: bool = False


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> bytes:
    """Lines and dots over axes that begin at 0, as an SVG document.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with new_figure(6.4, 4.0) as figure:
        axes = figure.subplots()
        for one in series:
            axes.plot(
                [x for x, _ in one.points],
                [y for _, y in one.points],
                "." if one.dots else "-",
                label=one.name or None,
                color=COLOURS[one.colour % len(COLOURS)],
                alpha=0.7 if one.dots else 1.0,
            )
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        if any(one.name for one in series):
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return render(figure, "svg")
