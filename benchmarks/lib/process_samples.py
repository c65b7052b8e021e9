"""What a process holds: memory, threads, open files, children. Linux only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.faulty_process import children_of

__all__ = ["ProcessSample", "processor_time", "sample_process"]


@dataclass(frozen=True)
class ProcessSample:
    """One look at a process. Memory is that of its children, too."""

    rss_mib: float
    pss_mib: float
    num_threads: int
    num_files: int
    num_children: int


def sample_process(pid: int) -> ProcessSample:
    """Look at a live process.

    Raises:
        OSError: there is none.
    """
    children = children_of(pid)
    memory = [_memory(each) for each in (pid, *children)]
    return ProcessSample(
        rss_mib=round(sum(rss for rss, _ in memory) / 1024, 1),
        pss_mib=round(sum(pss for _, pss in memory) / 1024, 1),
        num_threads=len(os.listdir(f"/proc/{pid}/task")),
        num_files=len(os.listdir(f"/proc/{pid}/fd")),
        num_children=len(children),
    )


def processor_time(pid: int) -> tuple[int, int]:
    """Nanoseconds that a process's live threads have run, and have waited for a processor."""
    ran_ns = waited_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            ran, waited, _ = (task / "schedstat").read_text(encoding="ascii").split()
        except OSError:  # a thread that has just ended
            continue
        ran_ns, waited_ns = ran_ns + int(ran), waited_ns + int(waited)
    return ran_ns, waited_ns


def _memory(pid: int) -> tuple[int, int]:
    """RSS and PSS in KiB; nothing of a child that has just ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace")
    except (ProcessLookupError, FileNotFoundError):
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return tuple(int(fields[name].split()[0]) for name in ("Rss", "Pss"))  # type: ignore[return-value]
