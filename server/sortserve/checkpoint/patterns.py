"""Regular expressions of a checkpoint, tried in a process of their own before they are used here.

Some take for ever (``(a+)+$``), and Python's ``re`` cannot be interrupted: it keeps the interpreter
lock. What a child process matches within its CPU time is matched again, as fast, by the library
that needs the answer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sortserve.core.errors import CheckpointError

__all__ = ["Pattern", "check_patterns"]

CPU_SECONDS = 2
_WALL_SECONDS = 60
"""For a machine so busy that the child does not get its CPU time."""
_MEMORY_BYTES = 1 << 30
_PLAIN = re.compile(r"[\w.-]*")

_CHILD = """
import json, re, sys
patterns, names, cpu_s, memory_bytes = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
except (ImportError, OSError, ValueError):
    pass
for index, pattern in enumerate(patterns):
    print(json.dumps([index, None]), flush=True)
    try:
        compiled = re.compile(pattern)
    except (re.error, ArithmeticError, MemoryError, RecursionError) as error:
        print(json.dumps([index, str(error) or type(error).__name__]), flush=True)
        break
    for name in names:
        compiled.match(name)
"""


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and the field it comes from."""

    field: str
    given: str
    """As it is written in the file."""
    regex: str
    """As it is matched, from the start of a name."""


def check_patterns(patterns: Sequence[Pattern], names: Iterable[str]) -> None:
    """Refuse patterns that are not valid, or that cannot be matched in a second or two.

    Raises:
        CheckpointError: one of them; its field is named.
    """
    if all(_PLAIN.fullmatch(pattern.given) for pattern in patterns):
        return  # names, not expressions
    regexes = [pattern.regex for pattern in patterns]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([regexes, list(names), CPU_SECONDS, _MEMORY_BYTES]),
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
        output, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        output, failed = (error.stdout or b"").decode(), True
    reports = [json.loads(line) for line in output.splitlines()]
    index, fault = reports[-1] if reports else (0, None)
    if failed and fault is None:
        fault = f"it cannot be matched in {CPU_SECONDS} s"
    if fault is not None:
        at = patterns[index]
        raise CheckpointError(f"{at.field}={at.given!r} is not a usable expression: {fault}.")
