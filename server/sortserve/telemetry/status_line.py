"""A line at the foot of a terminal that says what takes so long, below the lines of the log.

A log record may begin a phase (``extra=phase("timing the model's steps")``) or end one
(``extra=phase_over(...)``). Phases may overlap: several threads load. While there is any, the
newest and its seconds stand in the last line. Pure: text in, text out; the log's own thread writes
it, so that no line ever lands inside another.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["StatusLine", "phase", "phase_over", "wants_status_line"]

ERASE = "\r\033[K"
TICK_S = 1.0
MAX_NAME = 60
"""Characters of a phase's name: a line that wraps could not be taken back."""


def phase(name: str) -> dict[str, str]:
    """The ``extra`` of a logging call that begins a phase."""
    return {"phase": name}


def phase_over(name: str | None = None) -> dict[str, str | None]:
    """The ``extra`` of a logging call that ends a phase, if it is under way; None ends all."""
    return {"phase_over": name}


def wants_status_line(stream: TextIO | None) -> bool:
    """Whether ``stream`` is a terminal that can take a line back."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class StatusLine:
    """What stands at the foot of the terminal.

    Args:
        clock: seconds; any monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s: dict[str, float] = {}
        """When each phase that is under way began, the newest last."""

    @property
    def tick_s(self) -> float | None:
        """Seconds until the line should be painted again; None while there is none."""
        return TICK_S if self._began_s else None

    def below(self, line: str, record: logging.LogRecord) -> str:
        """A line of the log, and this one below it; takes up the record's phases."""
        before = self.erased()
        if hasattr(record, "phase"):
            self._began_s.pop(record.phase, None)
            self._began_s[record.phase] = self._clock()
        if hasattr(record, "phase_over"):
            over = list(self._began_s) if record.phase_over is None else [record.phase_over]
            for name in over:
                self._began_s.pop(name, None)
        return f"{before}{line}\n{self.painted()}"

    def painted(self) -> str:
        """The line; replaces itself. Empty while there is none."""
        if not self._began_s:
            return ""
        name, began_s = list(self._began_s.items())[-1]
        shown = "".join(c if c.isprintable() else "?" for c in name[:MAX_NAME])
        return f"{ERASE}... {shown}: {self._clock() - began_s:.0f} s"

    def erased(self) -> str:
        """What takes the line away; empty while there is none."""
        return ERASE if self._began_s else ""
