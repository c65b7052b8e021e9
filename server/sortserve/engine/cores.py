"""How many cores this process may keep busy (no torch).

Three things say so, and the least of them holds: the cores that the process may run on (its
affinity), without the second hardware thread of any, which has no arithmetic units of its own; and
the CPU quota of its control group and of those above it, which is how containers are limited.
Threads beyond a quota are no faster: the kernel stops all of them for the rest of the period.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["allowed_cpus", "num_usable_cores"]


def num_usable_cores(root: Path = Path("/")) -> int:
    """Threads that can run at once at full speed, 1 or more.

    Args:
        root: where the system's files lie.
    """
    cores = num_physical_cores(allowed_cpus(), root)
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def allowed_cpus() -> frozenset[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def num_physical_cores(cpus: frozenset[int], root: Path) -> int:
    """The cores that these logical CPUs belong to; each its own where the system does not say."""
    cores = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        cores.add(_read(topology / "thread_siblings_list") or str(cpu))
    return len(cores)


def cpu_quota(root: Path) -> float | None:
    """Seconds of CPU time that this process may take in a second; None: as many as there are."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    """Those of the process's control groups and of all above them, in version 2 and version 1."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            for folder in _upwards(root / "sys/fs/cgroup", group):
                yield from _quota(*(_read(folder / "cpu.max") or "").split())
        elif "cpu" in controllers.split(","):
            for folder in _upwards(root / "sys/fs/cgroup/cpu", group):
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                yield from _quota(*(_read(folder / name) or "" for name in names))


def _upwards(top: Path, group: str) -> Iterator[Path]:
    """The group's folder and those above it.

    In a container the path may be one of the host, of which nothing but the top is there to see.
    """
    folder = top / group.strip("/")
    yield folder
    while folder != top:
        folder = folder.parent
        yield folder


def _quota(*numbers: str) -> Iterator[float]:
    """Of ``quota period``; "max", "-1" and what cannot be read are none."""
    with suppress(ValueError):
        quota, period = map(int, numbers)
        if quota > 0 and period > 0:
            yield quota / period


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
