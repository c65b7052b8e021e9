"""An interactivity curve: tokens a second of all users over those of one, a line for each exit.

Each point is a closed loop of so many clients at one exit. What one user sees is the inverse of
the median TPOT; what all get together is the output of all clients a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sortserve.commands.bench_figures import Seen

if TYPE_CHECKING:
    from sortserve.commands.bench_load import Load
    from sortserve_client import AsyncClient

__all__ = ["curve_points", "curve_svg", "curve_text", "point_of", "run_curve"]

ROUNDS = 2
"""Fewest requests of a point for each of its clients: with one all would read at once."""

Figures = Mapping[str, Any]


async def run_curve(
    client: AsyncClient,
    load: Load,
    prompt_source: Iterator[list[int]],
    *,
    exits: Sequence[int],
    clients: Sequence[int],
    measure: Callable[[Sequence[Seen], float], Figures],
    clock: Callable[[], float],
    on_point: Callable[[int], object] = lambda count: None,
) -> list[dict[str, Any]]:
    """Run every point, one after the other; returns them in the order of ``curve_points``.

    Args:
        client: of the server.
        load: what every point sends, but for the exit and the number of clients.
        prompt_source: a prompt for each request.
        exits: a line each.
        clients: a point of each line each.
        measure: the figures of what was seen, and of the seconds it took.
        clock: seconds.
        on_point: is told how many points are done.
    """
    from sortserve.commands.bench_load import run_load

    points: list[dict[str, Any]] = []
    for exit_layer, num_clients in curve_points(exits, clients):
        budget = replace(load.budget, exit_layer=exit_layer)
        num_requests = max(load.num_requests, ROUNDS * num_clients)
        here = replace(
            load, budget=budget, num_clients=num_clients, rate=None, num_requests=num_requests
        )
        started_s = clock()
        records = await run_load(client, here, prompt_source)
        figures = measure(records, clock() - started_s)
        points.append(point_of(exit_layer, num_clients, figures))
        on_point(len(points))
    return points


def curve_points(exits: Sequence[int], clients: Sequence[int]) -> list[tuple[int, int]]:
    """Exit and number of clients of every point: a line after the other, few clients first."""
    return [(e, n) for e in sorted(set(exits)) for n in sorted(set(clients))]


def point_of(exit_layer: int, num_clients: int, figures: Figures) -> dict[str, Any]:
    """One point, as a JSON object."""
    tpot = figures["tpot_ms"]
    return {
        "exit_layer": exit_layer,
        "num_clients": num_clients,
        "user_tokens_per_s": None if tpot is None or not tpot["p50"] else 1e3 / tpot["p50"],
        "tokens_per_s": figures["output_tokens_per_s"],
        "ttft_p50_ms": figures["ttft_ms"] and figures["ttft_ms"]["p50"],
        "num_requests": figures["num_requests"],
        "num_failed": figures["num_failed"],
    }


def curve_text(points: Sequence[Figures]) -> str:
    """The curve as a table for a person."""
    head = ("exit", "clients", "tok/s of one", "tok/s of all", "TTFT p50 ms", "failed")
    rows = [head]
    for point in points:
        user, ttft = point["user_tokens_per_s"], point["ttft_p50_ms"]
        rows.append(
            (
                str(point["exit_layer"]),
                str(point["num_clients"]),
                "-" if user is None else f"{user:.1f}",
                f"{point['tokens_per_s']:.1f}",
                "-" if ttft is None else f"{ttft:.0f}",
                str(point["num_failed"]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def curve_svg(points: Sequence[Figures]) -> bytes:
    """The curve as an SVG document; points without a rate of one user are left out.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from sortserve.process.plot import Series, line_chart

    exits = sorted({point["exit_layer"] for point in points})
    lines = [
        Series(
            f"exit {exit_layer}",
            [
                (point["user_tokens_per_s"], point["tokens_per_s"])
                for point in points
                if point["exit_layer"] == exit_layer and point["user_tokens_per_s"] is not None
            ],
            colour,
        )
        for colour, exit_layer in enumerate(exits)
    ]
    return line_chart(
        "Interactivity", "tokens/s of one user (1 / TPOT p50)", "tokens/s of all", lines
    )
