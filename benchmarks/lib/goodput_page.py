"""Goodput for people: the rows of a table, a page in Markdown, and the figure of the README."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from benchmarks.lib.systems import SYSTEMS
from sortserve.process.plot import new_figure, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLUMNS",
    "Systems",
    "cells",
    "class_line",
    "draw",
    "markdown",
    "simulated_errors",
]

Systems = Mapping[str, Mapping[Any, Mapping[str, Any]]]
"""System to rate to figures."""

COLUMNS = (
    *("quality_goodput", "goodput_share", "met_of_admitted", "refused_share"),
    *("mean_depth_share", "mean_score", "output_tokens_per_s"),
)
PANELS = (
    ("quality_goodput", "quality-weighted goodput"),
    ("goodput_share", "budgets met, of all requests"),
    ("met_of_admitted", "budgets met, of admitted requests"),
    ("mean_score", "mean quality score of the tokens"),
)
"""Figure, and title of its panel: the first ``NUM_PANELS`` that a result has."""
NUM_PANELS = 3
STYLES = {
    "quality": ("#d1495b", "o", "-"),
    "attainment": ("#3d8b8b", "P", "-"),
    "depth": ("#6b6b6b", "X", "-"),
    "deadline": ("#d1495b", "o", "-"),
    "lockstep": ("#8d6a9f", "D", "--"),
    "full": ("#1b6ca8", "s", "--"),
    "middle": ("#c77d2a", "v", "--"),
    "shallow": ("#5b8e3f", "^", "--"),
}
"""Colour, marker and dashes of each system, ours first."""
SIMULATED_FIGURES = ("quality_goodput", "goodput_share")


def _label(system: str) -> str:
    """Of a system; results from before the server had objectives call ours ``deadline``."""
    return SYSTEMS[system].label if system in SYSTEMS else system


def cells(figures: Mapping[str, Any]) -> list[str | None]:
    """One run under ``COLUMNS``."""
    return [cell(figures.get(column)) for column in COLUMNS]


def cell(value: object) -> str | None:
    """A figure with three decimals."""
    return f"{value:.3f}" if isinstance(value, float) else None if value is None else str(value)


def class_line(name: str, figures: Mapping[str, Any]) -> str:
    """Quality-weighted goodput and share met of each class."""
    shares = (
        f"{c} {cell(q)} ({cell(figures['by_class'][c])} met)"
        for c, q in figures["quality_by_class"].items()
    )
    return f"{name}: quality-weighted goodput by class: {', '.join(shares)}"


def simulated_errors(results: Mapping[str, Any], figure: str) -> dict[str, dict[Any, float]]:
    """By system and rate: simulated over real, less 1."""
    found: dict[str, dict[Any, float]] = {}
    for system, rates in results.get("simulated", {}).items():
        for rate, simulated in rates.items():
            real = results["systems"][system][rate].get(figure)
            if real:
                found.setdefault(system, {})[rate] = (simulated[figure] or 0.0) / real - 1.0
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of a page: every load and system, and the simulator beside the server.

    The slow-down is how many times as long as at first a request alone took around the run. Systems
    are measured one after the other, and a tenth more of it can cost a system more than any choice.
    """
    lines = [
        "| load | requests/s | system | quality-weighted goodput | met, of all | met, of admitted "
        "| refused | mean depth | mean score | output tok/s | quality: tight / medium / loose "
        "| slow-down |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    half_rate, systems = results.get("half_rate"), results["systems"]
    for rate in next(iter(systems.values())):
        load = f"{float(rate) / half_rate:.2f}" if half_rate else ""
        for name, rates in systems.items():
            figures = rates[rate]
            classes = " / ".join(f"{q or 0.0:.2f}" for q in figures["quality_by_class"].values())
            shown = [c or "" for c in cells(figures)[:-1]]
            tokens = f"{figures['output_tokens_per_s']:.0f}"
            slowdown = f"{figures['slowdown']:.2f}" if "slowdown" in figures else ""
            row = [load, f"{float(rate):.2f}", _label(name), *shown, tokens, classes, slowdown]
            lines.append(f"| {' | '.join(row)} |")
    for figure in SIMULATED_FIGURES if results.get("simulated") else ():
        lines += ["", *_simulated_table(results, figure)]
    return "\n".join(lines)


def _simulated_table(results: Mapping[str, Any], figure: str) -> list[str]:
    rates = list(next(iter(results["systems"].values())))
    errors = simulated_errors(results, figure)
    title = dict(PANELS)[figure]
    lines = [
        f"Simulated / real, {title}:",
        "",
        f"| system | {' | '.join(f'{float(rate):.2f}/s' for rate in rates)} |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for name, simulated in results["simulated"].items():
        row = [_label(name)]
        for rate in rates:
            real, error = results["systems"][name][rate][figure], errors.get(name, {}).get(rate)
            off = "" if error is None else f" ({error:+.0%})"
            row.append(f"{cell(simulated[rate][figure])} / {cell(real)}{off}")
        lines.append(f"| {' | '.join(row)} |")
    worst = max((abs(e) for of in errors.values() for e in of.values()), default=0.0)
    return [*lines, "", f"Furthest apart: {worst:.1%}."]


def draw(results: Mapping[str, Any], format_: str) -> bytes:
    """The figure, as ``svg`` or ``png``: each system's line over the load, in a few panels.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    systems: Systems = results["systems"]
    known = {name for rates in systems.values() for figures in rates.values() for name in figures}
    chosen = list(islice(((n, t) for n, t in PANELS if n in known), NUM_PANELS))
    with new_figure(9.0, 3.4) as figure:
        panels = figure.subplots(1, len(chosen), sharex=True, sharey=True)
        for axes, (name, title) in zip(panels, chosen, strict=True):
            _draw_panel(axes, systems, name)
            axes.set_title(title, fontsize=9)
            if half_rate := results.get("half_rate"):
                axes.axvline(half_rate, color="#999999", lw=0.8, ls=":")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return render(figure, format_, dpi=110)


def _draw_panel(axes: Axes, systems: Systems, name: str) -> None:
    for system, (colour, marker, dashes) in STYLES.items():
        if system not in systems:
            continue
        points = [(float(rate), figures[name]) for rate, figures in systems[system].items()]
        points = [(rate, value) for rate, value in points if value is not None]
        axes.plot(
            [rate for rate, _ in points],
            [value for _, value in points],
            dashes,
            color=colour,
            marker=marker,
            markersize=4,
            lw=2.2 if system in ("quality", "deadline") else 1.2,
            label=_label(system),
        )
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("requests per second")
