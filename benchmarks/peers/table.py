"""From measurements to the table: medians over the turns, ceilings, and the best of the others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lib.common import print_table
from benchmarks.peers.catalogue import Configuration
from benchmarks.peers.floor import Ceiling

__all__ = ["Measured", "Row", "best_peer", "print_rows", "summarise_rows"]

OURS = "sortserve"
HEADER = (
    "configuration",
    "clients",
    "tok/s",
    "each turn",
    "TTFT p50 ms",
    "TPOT p50 ms",
    "ceiling tok/s",
    "% of it",
    "cut",
    "MiB",
    "AVX-512 threads",
    "best peer",
    "ours / it",
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One configuration in one turn under one number of clients."""

    configuration: str
    num_clients: int
    turn: int
    figures: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    configuration: str
    weights: str
    in_process: bool
    num_clients: int
    tokens_per_s: float
    """Median over the turns."""
    turns: Sequence[float]
    ttft_p50_ms: float | None
    tpot_p50_ms: float | None
    ceiling_tokens_per_s: float | None
    percent_of_ceiling: float | None
    num_cut: int | None
    """Most answers that were unfinished at the end of a load: it was too short for this server."""
    memory_mib: int | None
    avx512_threads: int | None
    best_peer: str | None = None
    """For a row of ours: the fastest other with as many bits."""
    ratio: float | None = None
    """Ours over that."""


def summarise_rows(
    chosen: Sequence[Configuration],
    measured: Sequence[Measured],
    ceilings: Mapping[tuple[str, int], Ceiling],
) -> list[Row]:
    """A row for each configuration and number of clients that was measured at least once."""
    rows = []
    for configuration in chosen:
        mine = [m for m in measured if m.configuration == configuration.name]
        for num_clients in sorted({m.num_clients for m in mine}):
            found = [m.figures for m in mine if m.num_clients == num_clients]
            limit = ceilings.get((configuration.name, num_clients))
            rows.append(_row(configuration, num_clients, found, limit))
    bits = {configuration.name: configuration.bits for configuration in chosen}
    return [_compare(row, rows, bits) for row in rows]


def best_peer(row: Row, rows: Sequence[Row], bits: Mapping[str, int]) -> Row | None:
    """The fastest row of another server with as many bits and clients; None if there is none."""
    rivals = [
        other
        for other in rows
        if not other.configuration.startswith(OURS)
        and other.num_clients == row.num_clients
        and bits[other.configuration] == bits[row.configuration]
    ]
    return max(rivals, key=lambda other: other.tokens_per_s, default=None)


def print_rows(rows: Sequence[Row], failures: Mapping[str, str]) -> None:
    """The table, and below it who is missing and why."""
    print_table(
        HEADER,
        (
            [
                row.configuration + (" (in process)" if row.in_process else ""),
                row.num_clients,
                row.tokens_per_s,
                " ".join(f"{value:.1f}" for value in row.turns),
                row.ttft_p50_ms,
                row.tpot_p50_ms,
                row.ceiling_tokens_per_s,
                row.percent_of_ceiling,
                row.num_cut,
                row.memory_mib,
                row.avx512_threads,
                row.best_peer,
                None if row.ratio is None else f"{row.ratio:.2f}",
            ]
            for row in rows
        ),
    )
    for name, reason in failures.items():
        print(f"{name}: {reason}")


def _row(
    configuration: Configuration,
    num_clients: int,
    found: Sequence[Mapping[str, Any]],
    limit: Ceiling | None,
) -> Row:
    turns = [float(figures["output_tokens_per_s"]) for figures in found]
    tokens_per_s = round(statistics.median(turns), 1)
    best = limit.tokens_per_s if limit else None
    return Row(
        configuration=configuration.name,
        weights=configuration.weights,
        in_process=configuration.in_process,
        num_clients=num_clients,
        tokens_per_s=tokens_per_s,
        turns=turns,
        ttft_p50_ms=_median(found, "ttft_p50_ms"),
        tpot_p50_ms=_median(found, "tpot_p50_ms"),
        ceiling_tokens_per_s=best,
        percent_of_ceiling=round(100 * tokens_per_s / best, 1) if best else None,
        num_cut=_largest(found, "num_cut"),
        memory_mib=_largest(found, "memory_mib"),
        avx512_threads=_largest(found, "avx512_threads"),
    )


def _compare(row: Row, rows: Sequence[Row], bits: Mapping[str, int]) -> Row:
    rival = best_peer(row, rows, bits) if row.configuration.startswith(OURS) else None
    if rival is None:
        return row
    ratio = round(row.tokens_per_s / rival.tokens_per_s, 3) if rival.tokens_per_s else None
    return Row(**{**vars(row), "best_peer": rival.configuration, "ratio": ratio})


def _median(found: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [figures[name] for figures in found if figures.get(name) is not None]
    return round(float(statistics.median(values)), 1) if values else None


def _largest(found: Sequence[Mapping[str, Any]], name: str) -> int | None:
    values = [int(figures[name]) for figures in found if figures.get(name) is not None]
    return max(values, default=None)
