"""The engine's watchdog with a clock of its own: a busy machine is no engine that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from sortserve.engine import worker
from sortserve.engine.stall import StallDetector
from support.faults import Fault

__all__ = ["HandWatchdog"]

NUM_LOOKS = 4
"""In one time-out."""
WAIT_S = 60.0


class HandWatchdog:
    """Stands in for the thread that watches a worker; time passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker, "start_watchdog", self._start)

    def _start(
        self,
        timeout_s: float,
        *,
        pulse: Callable[[], int | None],
        on_stall: Callable[[], None],
        ended: threading.Event,
    ) -> None:
        poll_s = timeout_s / NUM_LOOKS
        detector = StallDetector(timeout_s, poll_s)

        def pass_timeout() -> None:
            for turn in range(NUM_LOOKS + 2):  # the first sees no time, the last is past the end
                if not ended.is_set() and detector.look(pulse(), turn * poll_s):
                    on_stall()

        self._pass_timeout = pass_timeout

    async def time_out(self, fault: Fault) -> None:
        """Wait until the engine hangs in ``fault``, and let its time-out pass."""
        assert await asyncio.to_thread(fault.struck.wait, WAIT_S)
        self._pass_timeout()
