"""An event loop that does not get on is found, and one that does is left alone."""

from __future__ import annotations

from collections.abc import Callable

from sortserve.engine.stall import StallDetector
from sortserve.process.loop_watch import LoopPulse


class Loop:
    """Does what it was asked to when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.is_closed = False

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        if self.is_closed:
            raise RuntimeError("Event loop is closed")
        self.waiting.append(callback)

    def get_on(self) -> None:
        waiting, self.waiting = self.waiting, []
        for callback in waiting:
            callback()


def looks(loop: Loop, num_looks: int, *, stuck_from: int) -> list[bool]:
    """What is found at one look a second; the loop gets on between those before ``stuck_from``."""
    pulse, detector = LoopPulse(loop), StallDetector(timeout_s=3.0, poll_s=1.0)
    found = []
    for second in range(num_looks):
        found.append(detector.look(pulse.look(), float(second)))
        if second < stuck_from:
            loop.get_on()
    return found


def test_a_loop_that_gets_on_is_never_stuck() -> None:
    assert looks(Loop(), 20, stuck_from=20) == [False] * 20


def test_a_loop_is_stuck_once_one_thing_has_lasted_too_long() -> None:
    assert looks(Loop(), 8, stuck_from=2).index(True) == 6


def test_a_loop_is_asked_for_one_sign_at_a_time() -> None:
    loop = Loop()
    looks(loop, 10, stuck_from=0)

    assert len(loop.waiting) == 1


def test_a_loop_that_is_closed_has_nothing_to_do() -> None:
    loop = Loop()
    loop.is_closed = True

    assert LoopPulse(loop).look() is None
