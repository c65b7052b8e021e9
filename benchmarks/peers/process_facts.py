"""What the kernel knows of a running server: its memory, and whether it computes with AVX-512."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["avx512_threads", "memory_bytes", "parse_elapsed_ms"]

PROC = Path("/proc")


def memory_bytes(pid: int, proc: Path = PROC) -> int:
    """Resident memory of a process and its children; pages that several share count once."""
    total = 0
    for process in _family(pid, proc):
        with suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+) kB", (process / "smaps_rollup").read_text(), re.M)
            total += int(found[1]) * 1024 if found else 0
    return total


def avx512_threads(pid: int, within_ms: float, proc: Path = PROC) -> int | None:
    """How many threads of a server touched AVX-512 registers in the last ``within_ms``.

    The kernel notes it at task switches. 0 is proof that an instruction set without AVX-512 was
    forced; a number above 0 may come from a copy of memory. None where the kernel does not tell.
    """
    known, used = False, 0
    for process in _family(pid, proc):
        with suppress(OSError):
            for status in (process / "task").glob("*/arch_status"):
                with suppress(OSError):
                    elapsed_ms = parse_elapsed_ms(status.read_text())
                    known = known or elapsed_ms is not None
                    used += elapsed_ms is not None and 0 <= elapsed_ms <= within_ms
    return used if known else None


def parse_elapsed_ms(text: str) -> int | None:
    """Milliseconds since AVX-512 was used last, from ``arch_status``; -1 is never."""
    found = re.search(r"^AVX512_elapsed_ms:\s+(-?\d+)", text, re.M)
    return int(found[1]) if found else None


def _family(pid: int, proc: Path) -> Iterator[Path]:
    """The process and all below it."""
    children: dict[int, list[int]] = {}
    for path in proc.glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            # The name, in parentheses, may hold anything.
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.name))
    todo = [pid]
    while todo:
        current = todo.pop()
        yield proc / str(current)
        todo += children.get(current, [])
