"""The figure of the README: what share of latency budgets is met, and at what quality.

python -m benchmarks.plot_promises

It reads the JSON line of ``benchmarks.goodput`` in a committed result and writes a PNG; nothing is
measured. The same result gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "read_systems"]

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "2026-11-25-promises.md"
FIGURE = ROOT / "docs" / "images" / "promises.png"

Systems = dict[str, dict[str, dict[str, Any]]]
"""System to rate to figures."""

LINES = (
    ("deadline", "policy deadline (the default)", "#d1495b", "o", "-"),
    ("lockstep", "policy lockstep, same admission", "#8d6a9f", "D", "--"),
    ("full", "full depth always", "#1b6ca8", "s", "--"),
    ("middle", "exit 24 always", "#c77d2a", "v", "--"),
    ("shallow", "exit 18 always", "#5b8e3f", "^", "--"),
)
"""System, label, colour, marker and dashes."""
PANELS = (
    ("goodput_share", "budgets met, of all requests"),
    ("met_of_admitted", "budgets met, of admitted requests"),
    ("mean_score", "mean quality score of the tokens"),
)
"""Figure of the result, and title of its panel."""
STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def read_systems(result: Path) -> Systems:
    """The figures of each system at each rate, from the first goodput line of a result."""
    for line in result.read_text(encoding="utf-8").splitlines():
        if line.startswith('{"benchmark": "goodput"'):
            systems: Systems = json.loads(line)["results"]["systems"]
            return systems
    raise ValueError(f"{result} has no JSON line of benchmarks.goodput.")


def draw(systems: Systems, path: Path) -> None:
    """Write the figure as a PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(PANELS), sharex=True, sharey=True)
        for axes, (name, title) in zip(panels, PANELS, strict=True):
            _draw_panel(axes, systems, name, title)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None})


def _draw_panel(axes: Axes, systems: Systems, name: str, title: str) -> None:
    for system, label, colour, marker, dashes in LINES:
        rates = [float(rate) for rate in systems[system]]
        values = [figures[name] for figures in systems[system].values()]
        width = 2.2 if system == "deadline" else 1.2
        axes.plot(
            rates, values, dashes, color=colour, marker=marker, markersize=4, lw=width, label=label
        )
    axes.set_title(title, fontsize=9)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("requests per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULT, help="a result with a goodput line")
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the PNG goes")
    arguments = parser.parse_args()
    draw(read_systems(arguments.result), arguments.output)
    print(f"plot: {arguments.output}")


if __name__ == "__main__":
    main()
