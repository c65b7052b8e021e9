"""The README's figure is drawn from a committed result."""

from __future__ import annotations

from pathlib import Path

from benchmarks.plot_promises import FIGURE, LINES, RESULT, draw, read_systems


def test_the_figure_is_drawn_from_the_committed_result(tmp_path: Path) -> None:
    systems = read_systems(RESULT)

    draw(systems, tmp_path / "promises.png")

    assert set(systems) == {system for system, *_ in LINES}
    assert (tmp_path / "promises.png").read_bytes().startswith(b"\x89PNG")
    assert FIGURE.stat().st_size < 100_000
