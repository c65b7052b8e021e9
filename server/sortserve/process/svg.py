"""A line chart as an SVG document: enough for a profile, and no library to install (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "line_chart"]

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 168, 40, 48
COLOURS = ("#1b6ca8", "#c8553d", "#4c956c", "#8e5ea2", "#b58900", "#555555")
NUM_TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line, or one cloud of dots, with its name in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    colour: int | None = None
    """Index into the palette; None: the series' own place."""


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """The chart as text. Axes begin at 0 and end at a round number above all points."""
    points = [point for one in series for point in one.points]
    x_step, y_step = (_tick_step(max((p[i] for p in points), default=1.0)) for i in (0, 1))
    x_max, y_max = NUM_TICKS * x_step, NUM_TICKS * y_step

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / x_max * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - y / y_max * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text((LEFT, 22), title, size=15),
        _text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10), x_label, anchor="middle"),
        _text((LEFT, TOP - 6), y_label),
    ]
    for tick in range(NUM_TICKS + 1):
        left, right = place(0, tick * y_step), place(x_max, tick * y_step)
        parts.append(_line([left, right], "#dddddd"))
        parts.append(_text((left[0] - 6, left[1] + 4), f"{tick * y_step:g}", anchor="end"))
        foot = place(tick * x_step, 0)
        parts.append(_text((foot[0], foot[1] + 16), f"{tick * x_step:g}", anchor="middle"))
    for i, one in enumerate(series):
        colour = COLOURS[(i if one.colour is None else one.colour) % len(COLOURS)]
        placed = [place(x, y) for x, y in one.points]
        parts += [_dot(p, colour) for p in placed] if one.dots else [_line(placed, colour, 2)]
        key = (WIDTH - RIGHT + 16, TOP + 18 * i)
        parts.append(
            _dot(key, colour) if one.dots else _line([key, (key[0] + 12, key[1])], colour, 2)
        )
        parts.append(_text((key[0] + 18, key[1] + 4), one.name))
    return "\n".join([*parts, "</svg>", ""])


def _tick_step(highest: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that covers it in ``NUM_TICKS`` steps."""
    least = max(highest, 1e-9) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * m for m in (1.0, 2.0, 2.5, 5.0, 10.0) if power * m >= least * (1 - 1e-9))


def _text(at: tuple[float, float], text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{at[0]}" y="{at[1]}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )


def _line(points: Sequence[tuple[float, float]], colour: str, width: int = 1) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _dot(at: tuple[float, float], colour: str) -> str:
    return f'<circle cx="{at[0]}" cy="{at[1]}" r="3" fill="{colour}"/>'
