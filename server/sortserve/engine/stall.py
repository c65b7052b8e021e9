"""Has the engine's thread stopped getting on? (no torch)"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["StallDetector", "start_watchdog"]

WATCH_POLL_S = 1.0
"""Seconds between two looks, at most."""


@dataclass
class StallDetector:
    """Told now and then what the engine's thread is at, it says when that has lasted too long.

    Time counts only as far as somebody looks: a machine that was suspended, or a process that was
    stopped, was not working in between.
    """

    timeout_s: float
    poll_s: float
    """How often ``look`` is called; more than twice that between two looks does not count."""
    _pulse: int | None = None
    _looked_s: float | None = None
    _stuck_s: float = 0.0

    def look(self, pulse: int | None, now: float) -> bool:
        """Whether the thread is stuck.

        Args:
            pulse: a number that changes whenever the thread gets on; None: it has nothing to do.
            now: any monotonic clock, in seconds.
        """
        since_s = 0.0 if self._looked_s is None else now - self._looked_s
        is_stuck = pulse is not None and pulse == self._pulse
        self._stuck_s = self._stuck_s + min(since_s, 2 * self.poll_s) if is_stuck else 0.0
        self._pulse, self._looked_s = pulse, now
        return self._stuck_s > self.timeout_s


def start_watchdog(
    timeout_s: float,
    *,
    pulse: Callable[[], int | None],
    on_stall: Callable[[], None],
    ended: threading.Event,
) -> None:
    """Watch on a thread of its own until ``ended``.

    Args:
        timeout_s: how long the same pulse may last.
        pulse: as in ``StallDetector.look``.
        on_stall: called when it has lasted longer, again at each look.
        ended: nobody needs to be watched any more.
    """
    poll_s = min(WATCH_POLL_S, timeout_s / 4)
    detector = StallDetector(timeout_s, poll_s)

    def watch() -> None:
        while not ended.wait(poll_s):
            if detector.look(pulse(), time.monotonic()):
                on_stall()

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
