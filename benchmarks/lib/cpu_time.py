"""The CPU time of another process, thread by thread, as Linux counts it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["main_thread_share", "process_share", "thread_times"]

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def thread_times(pid: int) -> dict[int, float]:
    """Seconds of CPU that each live thread of a process has used so far, by thread id.

    Raises:
        OSError: there is no such process.
    """
    times = {}
    for entry in Path(f"/proc/{pid}/task").iterdir():
        try:
            text = (entry / "stat").read_text(encoding="utf-8")
        except OSError:
            continue  # a thread that has just ended
        fields = text.rpartition(")")[2].split()  # the name before may hold anything
        times[int(entry.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return times


def process_share(before: Mapping[int, float], after: Mapping[int, float], wall_s: float) -> float:
    """What all threads took between two readings, in cores."""
    return sum(s - before.get(thread, 0.0) for thread, s in after.items()) / wall_s


def main_thread_share(
    pid: int, before: Mapping[int, float], after: Mapping[int, float], wall_s: float
) -> float:
    """What the first thread took, in cores: of a server, its event loop's."""
    return (after[pid] - before[pid]) / wall_s
