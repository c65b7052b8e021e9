"""SIGINT and SIGTERM, heard and obeyed whatever the rest of the process is doing.

Python runs signal handlers on the main thread, between two of its instructions: a main thread that
is stuck, in an event loop that somebody blocked or in a write that nobody reads, hears nothing. So
a thread of its own reads the numbers that the interpreter's C handler writes into a socket, and it
ends the process by itself when the time that the process was given to end is over.

What remains is native code that never gives the interpreter's lock back: no thread runs beside it,
and only SIGKILL ends it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Self

__all__ = ["SignalGuard"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MOVED, _STOP = 0, 255
"""Bytes that are no signal's number: the deadline was moved; the guard is dismissed."""
_MAX_WAIT_S = 3600.0
"""A socket's longest time-out is finite; a deadline may be further off."""


class SignalGuard:
    """Hears signals between ``with`` and its end. The main thread must enter and leave it.

    Args:
        on_signal: told each signal's number, on the guard's thread.
        last_words: called with the exit code before the process is ended; must not block.
        also: signals beside SIGINT and SIGTERM that are heard, and end nothing by themselves.
        end: ends the process at once.
    """

    def __init__(
        self,
        on_signal: Callable[[int], None],
        *,
        last_words: Callable[[int], None],
        also: Sequence[int] = (),
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._on_signal = on_signal
        self._last_words = last_words
        self._heard = (*SIGNALS, *also)
        self._end = end
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._exit_code = 1
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    def __enter__(self) -> Self:
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._handlers = {number: signal.signal(number, _ignore) for number in self._heard}
        self._fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._mouth.setblocking(True)
        self._mouth.send(bytes([_STOP]))
        self._thread.join()
        self._mouth.close()
        self._ears.close()

    def listen_again(self) -> None:
        """Take the signals back from a library that has put handlers of its own in our place."""
        for number in self._heard:
            signal.signal(number, _ignore)

    def end_within(self, seconds: float, exit_code: int) -> None:
        """The process ends with this code in so many seconds, unless it has ended by then.

        Of several deadlines the earliest stands, and the last exit code. Any thread may call.
        """
        with self._lock:
            deadline = time.monotonic() + seconds
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
            self._exit_code = exit_code
        try:
            self._mouth.send(bytes([_MOVED]))
        except BlockingIOError:  # full of signals: the thread is awake already
            return

    def _listen(self) -> None:
        while True:
            with self._lock:
                deadline, exit_code = self._deadline, self._exit_code
            left_s = _MAX_WAIT_S if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                self._last_words(exit_code)
                self._end(exit_code)
                return
            self._ears.settimeout(min(left_s, _MAX_WAIT_S))
            try:
                received = self._ears.recv(64)
            except TimeoutError:
                continue
            for number in received:
                if number == _STOP:
                    return
                if number in self._heard:
                    self._on_signal(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Signals are heard elsewhere; a handler must be there for that."""
