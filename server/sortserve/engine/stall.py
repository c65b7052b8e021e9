"""Has the engine's thread stopped getting on? (no torch, no clock)"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StallDetector"]


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
