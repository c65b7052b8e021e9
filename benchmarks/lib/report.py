"""Turns a finished load into figures per exit class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lib.common import print_table, summarise
from benchmarks.lib.loadgen import RequestRecord, Run

__all__ = ["met_budget", "print_report", "report"]

TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
MAX_ERRORS_SHOWN = 5


def met_budget(record: RequestRecord, budget: Mapping[str, Any]) -> bool | None:
    """Whether the client saw every time of ``budget`` kept; None if it bounds none."""
    seen = {"latency_ms": record.e2e_s, "ttft_ms": record.ttft_s, "tpot_ms": record.tpot_s}
    limits = {name: float(budget[name]) for name in seen if budget.get(name) is not None}
    if not limits:
        return None
    if not record.ok:
        return False
    return all(
        seconds * 1e3 <= limits[name]
        for name, seconds in seen.items()
        if name in limits and seconds is not None
    )


def report(run: Run, budget: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All figures of a run: totals, and each exit class by itself.

    A class is the exit that was asked for, else the one the server says it used. Requests cut by
    the end of the run count for the throughput, not for the latencies.
    """
    budget = budget or {}
    classes: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in run.records:
        exit_layer = record.exit_layer or record.served_exit
        classes[f"exit {exit_layer}" if exit_layer else "default"].append(record)
    finished = [record for record in run.records if record.ok]
    failed = [record for record in run.records if record.error is not None]
    num_output = sum(record.num_output_tokens for record in run.records)
    num_prompt = sum(record.num_prompt_tokens for record in run.records)
    grades = [met for r in run.records if not r.cut and (met := met_budget(r, budget)) is not None]
    return {
        "wall_s": round(run.wall_s, 3),
        "num_finished": len(finished),
        "num_failed": len(failed),
        "num_cut": sum(record.cut for record in run.records),
        "errors": sorted({str(record.error) for record in failed})[:MAX_ERRORS_SHOWN],
        "output_tokens_per_s": round(num_output / run.wall_s, 2),
        "total_tokens_per_s": round((num_output + num_prompt) / run.wall_s, 2),
        "requests_per_s": round(len(finished) / run.wall_s, 3),
        "goodput_share": round(sum(grades) / len(grades), 4) if grades else None,
        "goodput_per_s": round(sum(grades) / run.wall_s, 3) if grades else None,
        "max_send_lag_ms": round(
            max((r.sent_s - r.due_s for r in run.records), default=0) * 1e3, 2
        ),
        "generator_cpu_share": round(run.cpu_s / run.wall_s, 3),
        "classes": {
            name: _class_report(records, run.wall_s, budget)
            for name, records in sorted(classes.items(), key=lambda item: (len(item[0]), item[0]))
        },
    }


def print_report(figures: Mapping[str, Any]) -> None:
    """Prints a report as two small tables: totals, then a row per class and time."""
    totals = {name: value for name, value in figures.items() if name not in ("classes", "errors")}
    print_table(["total", "value"], ((name, value) for name, value in totals.items()))
    for error in figures["errors"]:
        print(f"error: {error}")
    print()
    columns = ("mean", "p50", "p90", "p99")
    rows: list[Sequence[object]] = []
    for name, group in figures["classes"].items():
        for time in TIMES:
            summary = group[time] or {}
            rows.append([name, time, *(summary.get(column) for column in columns)])
    print_table(["class", "time", *columns], rows)


def _class_report(
    records: Sequence[RequestRecord], wall_s: float, budget: Mapping[str, Any]
) -> dict[str, Any]:
    finished = [record for record in records if record.ok]
    times: dict[str, list[float | None]] = {
        "ttft_ms": [r.ttft_s for r in finished],
        "tpot_ms": [r.tpot_s for r in finished],
        "itl_ms": [gap for r in finished for gap in r.itls_s],
        "e2e_ms": [r.e2e_s for r in finished],
    }
    num_output = sum(record.num_output_tokens for record in records)
    grades = [met for r in records if not r.cut and (met := met_budget(r, budget)) is not None]
    figures: dict[str, Any] = {
        "num_finished": len(finished),
        "num_failed": sum(record.error is not None for record in records),
        "output_tokens_per_s": round(num_output / wall_s, 2),
        "goodput_share": round(sum(grades) / len(grades), 4) if grades else None,
    }
    for name, values in times.items():
        figures[name] = summarise([seconds * 1e3 for seconds in values if seconds is not None])
    return figures
