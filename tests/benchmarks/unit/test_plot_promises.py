"""The README's figure is drawn from a committed result."""

from __future__ import annotations

from typing import Any

from benchmarks.lib.goodput_page import draw, markdown, simulated_errors
from benchmarks.lib.systems import SYSTEMS
from benchmarks.plot_promises import FIGURE, newest_result, read_results


def figures(quality: float) -> dict[str, Any]:
    shares = dict.fromkeys(("goodput_share", "met_of_admitted", "refused_share"), 0.5)
    means = dict.fromkeys(("mean_depth_share", "mean_score", "output_tokens_per_s"), 0.75)
    classes = {"tight": 0.1, "medium": 0.2, "loose": None}
    return {
        "quality_goodput": quality,
        **shares,
        **means,
        "by_class": classes,
        "quality_by_class": classes,
        "slowdown": 1.107,
    }


def results(*names: str) -> dict[str, Any]:
    """As they are read back from JSON: rates are text."""
    systems = {name: {"2.0": figures(0.5), "4.0": figures(0.4)} for name in names}
    simulated = {name: {"2.0": figures(0.45), "4.0": figures(0.41)} for name in names}
    return {"half_rate": 4.0, "systems": systems, "simulated": simulated}


def test_the_figure_is_drawn_from_the_committed_result() -> None:
    committed = read_results(newest_result())

    assert draw(committed, "png").startswith(b"\x89PNG")
    assert set(committed["systems"]) <= set(SYSTEMS)
    assert FIGURE.stat().st_size < 100_000


def test_the_figure_begins_with_quality_weighted_goodput() -> None:
    svg = draw(results(*SYSTEMS), "svg").decode()

    assert svg.index("quality-weighted goodput") < svg.index("budgets met, of all requests")
    assert all(system.label in svg for system in SYSTEMS.values())


def test_the_tables_have_a_row_for_each_load_and_system() -> None:
    lines = markdown(results("full", "lockstep")).splitlines()

    rows = [line for line in lines if line.startswith(("| 0.50 |", "| 1.00 |"))]
    assert len(rows) == 4
    assert rows[0] == (
        "| 0.50 | 2.00 | full depth always | 0.500 | 0.500 | 0.500 | 0.500 | 0.750 | 0.750 | 1 "
        "| 0.10 / 0.20 / 0.00 | 1.11 |"
    )
    assert "| full depth always | 0.450 / 0.500 (-10%) | 0.410 / 0.400 (+2%) |" in lines
    assert "Furthest apart: 10.0%." in lines


def test_an_error_of_the_simulator_is_relative_to_the_server() -> None:
    errors = simulated_errors(results("full"), "quality_goodput")

    assert {rate: round(error, 3) for rate, error in errors["full"].items()} == {
        "2.0": -0.1,
        "4.0": 0.025,
    }
