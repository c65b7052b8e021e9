"""A long check in parts: each a process of its own with a time limit, so that one that hangs or
fails costs itself alone, and what the others found is kept.

    found = run_parts([Part("offline", [sys.executable, "-m", ...], limit_s=90)], total_s=480)

The document is written anew after each part, so that it is there whatever ends the whole.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Part", "last_json", "run_parts", "write_document"]

TAIL_CHARS = 2000
"""Of what a part that did not go well printed, so many last characters are kept."""
LEAST_S = 5.0
"""With less time left a part is not begun."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    command: Sequence[str]
    limit_s: float
    read: Callable[[str], Any] | None = None
    """What it found, from what it printed; None: ``last_json``. A ValueError: it found nothing."""
    needs: str | None = None
    """A part without whose success this one is not begun."""


def run_parts(
    parts: Sequence[Part],
    *,
    total_s: float,
    after_each: Callable[[Mapping[str, Any]], None] = lambda found: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run the parts in their order; what became of each, by its name.

    Each is a mapping: ``status`` (``ok``, ``failed``, ``timed out``, ``not begun``), ``seconds``,
    ``result`` (what it found, which a part that failed may have, too) and, unless it is ok,
    ``output``, the end of what it printed, or why it was not begun.

    Args:
        parts: to run.
        total_s: for all; a part gets its own limit or what is left, whichever is less.
        after_each: gets what has become of the parts so far.
        clock: seconds.
    """
    started_s = clock()
    found: dict[str, Any] = {}
    for part in parts:
        left_s = total_s - (clock() - started_s)
        if part.needs is not None and found[part.needs]["status"] != "ok":
            found[part.name] = _not_begun(f"it needs {part.needs}")
        elif left_s < min(LEAST_S, part.limit_s):
            found[part.name] = _not_begun(f"the {total_s:g} s of all parts are over")
        else:
            print(f"== {part.name}", flush=True)
            found[part.name] = _run(part, min(part.limit_s, left_s), clock)
        after_each(found)
    return found


def _not_begun(why: str) -> dict[str, Any]:
    return {"status": "not begun", "seconds": 0.0, "result": None, "output": why}


def _run(part: Part, limit_s: float, clock: Callable[[], float]) -> dict[str, Any]:
    started_s = clock()
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        status = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        output, status = _end(process), "timed out"
    print(output, flush=True)
    try:
        result = (part.read or last_json)(output)
    except ValueError:
        result = None
        status = "failed" if status == "ok" else status
    about = {"status": status, "seconds": round(clock() - started_s, 1), "result": result}
    return about if status == "ok" else {**about, "output": output[-TAIL_CHARS:]}


def _end(process: subprocess.Popen[str]) -> str:
    """End a process and all that it has started; returns what it had printed."""
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    return output


def last_json(output: str) -> Any:
    """The last line, as JSON.

    Raises:
        ValueError: it is none.
    """
    lines = output.splitlines()
    return json.loads(lines[-1] if lines else "")


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    new.replace(path)
