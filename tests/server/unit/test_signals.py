"""Signals are heard on a thread of their own, and a deadline ends the process."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Sequence

from sortserve.process.signals import SignalGuard

WAIT_S = 30


class Told:
    """A guard whose process does not end, and what it said."""

    def __init__(self, also: Sequence[int] = ()) -> None:
        self.heard: queue.Queue[int] = queue.Queue()
        self.ended: queue.Queue[tuple[str, int]] = queue.Queue()
        self.guard = SignalGuard(
            self.heard.put,
            last_words=lambda code: self.ended.put(("said", code)),
            also=also,
            end=lambda code: self.ended.put(("ended", code)),
        )


def test_signals_are_heard_while_the_main_thread_waits() -> None:
    told = Told()
    heard = []

    with told.guard:
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), sig)
            heard.append(told.heard.get(timeout=WAIT_S))

    assert heard == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]


def test_further_signals_are_heard_where_somebody_wants_them_and_end_nothing() -> None:
    before = signal.getsignal(signal.SIGHUP)
    told = Told(also=(signal.SIGHUP,))

    with told.guard:
        os.kill(os.getpid(), signal.SIGHUP)
        assert told.heard.get(timeout=WAIT_S) == signal.SIGHUP
        assert told.ended.empty()

    assert signal.getsignal(signal.SIGHUP) == before


def test_the_former_handlers_are_back_afterwards() -> None:
    before = [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)]

    with Told().guard:
        assert signal.getsignal(signal.SIGTERM) != before[1]

    assert [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_deadline_ends_the_process_with_its_exit_code_after_the_last_words() -> None:
    told = Told()

    with told.guard:
        told.guard.end_within(0, 3)
        ends = [told.ended.get(timeout=WAIT_S) for _ in range(2)]

    assert ends == [("said", 3), ("ended", 3)]


def test_a_deadline_moves_only_forward_and_the_last_exit_code_counts() -> None:
    told = Told()

    with told.guard:
        told.guard.end_within(1e12, 1)
        told.guard.end_within(0.01, 2)
        told.guard.end_within(1e12, 3)
        told.ended.get(timeout=WAIT_S)
        assert told.ended.get(timeout=WAIT_S) == ("ended", 3)


def test_a_guard_that_is_left_in_time_ends_nothing() -> None:
    told = Told()

    with told.guard:
        told.guard.end_within(WAIT_S, 1)

    assert told.ended.empty()
    assert "signals" not in {thread.name for thread in threading.enumerate()}
