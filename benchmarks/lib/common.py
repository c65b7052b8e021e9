"""What every benchmark prints: statistics, a table, and one JSON document as the last line."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "ROOT",
    "environment",
    "json_line",
    "metric_total",
    "percentile",
    "print_json",
    "print_table",
    "summarise",
]

ROOT = Path(__file__).resolve().parents[2]
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
PACKAGES = ("sortserve", "torch", "transformers")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of ``values`` lie, linear between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no percentile of no values")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50, p90, p99 and the number of ``values``; None where there are none."""
    if not values:
        return None
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    summary = {name: round(percentile(values, share), 3) for name, share in shares.items()}
    return {"count": len(values), "mean": round(math.fsum(values) / len(values), 3)} | summary


def environment() -> dict[str, Any]:
    """Hardware, versions, commit and load at this moment: what a figure means nothing without."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _cpu_flags()],
        "num_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints right-aligned columns; the first is left-aligned, None is a dash."""
    lines = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())


def print_json(
    benchmark: str,
    arguments: argparse.Namespace,
    described: Mapping[str, Any],
    results: Mapping[str, Any],
    output: Path | None = None,
) -> None:
    """Prints ``json_line``, always the last line of a benchmark, and writes it to ``output``."""
    line = json_line(benchmark, arguments, described, results)
    if output is not None:
        output.write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)


def json_line(
    benchmark: str,
    arguments: argparse.Namespace,
    described: Mapping[str, Any],
    results: Mapping[str, Any],
) -> str:
    """The whole run as one line of JSON.

    ``described`` is ``environment()`` from before the run, so that the load average is the
    machine's and not the benchmark's own.
    """
    shown = {name: value for name, value in vars(arguments).items() if name != "api_key"}
    document = {
        "benchmark": benchmark,
        "arguments": shown,
        "environment": dict(described),
        "results": results,
    }
    return json.dumps(document, default=str)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None  # an unpacked source archive
    return done.stdout.strip()


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""  # not Linux
    found = (line.partition(":")[2] for line in text.splitlines() if line.startswith(key))
    return next(found, "").strip()


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags").split())


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def metric_total(text: str, name: str) -> float | None:
    """The sum of one metric over its labels in Prometheus text; None if it is not there."""
    values = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((f"{name} ", f"{name}{{"))
    ]
    return sum(values) if values else None
