"""Has the event loop stopped getting on? Then nobody is answered any more, not even by a probe."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from sortserve.engine.stall import start_watchdog

__all__ = ["LoopPulse", "watched_loop"]


class _Loop(Protocol):
    def call_soon_threadsafe(self, callback: Callable[[], None]) -> object:
        """As of asyncio."""


class LoopPulse:
    """Asks the loop for a sign of life, one at a time.

    Args:
        loop: does what it is asked to as soon as it gets on.
    """

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop
        self._num_asked = 0
        self._num_given = 0

    def look(self) -> int | None:
        """How many signs it has given: unchanged where it is stuck; None where it is closed."""
        if self._num_given == self._num_asked:
            try:
                self._loop.call_soon_threadsafe(self._give)
            except RuntimeError:
                return None
            self._num_asked += 1
        return self._num_given

    def _give(self) -> None:
        self._num_given += 1


@contextmanager
def watched_loop(
    timeout_s: float | None, on_stall: Callable[[], None], loop: asyncio.AbstractEventLoop
) -> Iterator[None]:
    """Within the block ``on_stall`` is called, on another thread, when the loop does not get on.

    Args:
        timeout_s: how long it may take over one thing; None: for ever.
        on_stall: called again each second while it lasts.
        loop: who is watched.
    """
    if timeout_s is None:
        yield
        return
    ended = threading.Event()
    start_watchdog(timeout_s, pulse=LoopPulse(loop).look, on_stall=on_stall, ended=ended)
    try:
        yield
    finally:
        ended.set()
