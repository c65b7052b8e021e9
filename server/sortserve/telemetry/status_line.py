"""A line at the foot of a terminal that says what takes so long, below the lines of the log.

A log record may begin a phase (``extra=phase("timing the model's steps")``) or end the one under
way (``extra=phase(None)``). While a phase lasts, its name and its seconds stand in the last line.
Pure: text in, text out; the log's own thread writes it, so that no line ever lands inside another.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["StatusLine", "phase", "wants_status_line"]

ERASE = "\r\033[K"
TICK_S = 0.5


def phase(name: str | None) -> dict[str, str | None]:
    """The ``extra`` of a logging call that begins a phase, or, with None, ends the present one."""
    return {"phase": name}


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
        self._name: str | None = None
        self._began_s = 0.0

    @property
    def tick_s(self) -> float | None:
        """Seconds until the line should be painted again; None while there is none."""
        return None if self._name is None else TICK_S

    def below(self, line: str, record: logging.LogRecord) -> str:
        """A line of the log, and this one below it; takes up the record's phase."""
        before = self.erased()
        if hasattr(record, "phase"):
            self._name, self._began_s = record.phase, self._clock()
        return f"{before}{line}\n{self.painted()}"

    def painted(self) -> str:
        """The line; replaces itself. Empty while there is none."""
        if self._name is None:
            return ""
        return f"{ERASE}... {self._name}: {self._clock() - self._began_s:.0f} s"

    def erased(self) -> str:
        """What takes the line away; empty while there is none."""
        return "" if self._name is None else ERASE
