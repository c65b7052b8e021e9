"""A logging handler that never waits for whoever reads the log.

A pipe that nobody reads takes 64 KiB and then blocks its writer for ever. So a thread of its own
writes, and what piles up in front of it is bounded: lines beyond the bound are dropped, and a line
in their place says how many.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from sortserve.telemetry.status_line import StatusLine

__all__ = ["LogWriter"]

MAX_WAITING_CHARS = 8 << 20
RECORD_CHARS = 500
"""What a record weighs beside its strings."""


class LogWriter(logging.Handler):
    """Writes records on its own thread, in the order they came.

    Args:
        stream: where to; may block, break or be closed.
        formatter: makes lines of records, on the writing thread.
        max_waiting_chars: bound on the text that waits.
        status: the line at the foot of a terminal; None: there is none.
    """

    def __init__(
        self,
        stream: TextIO | None,
        formatter: logging.Formatter,
        *,
        max_waiting_chars: int = MAX_WAITING_CHARS,
        status: StatusLine | None = None,
    ) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        self._max_waiting_chars = max_waiting_chars
        self._status = status
        self._changed = threading.Condition()
        self._waiting: deque[tuple[logging.LogRecord, int]] = deque()
        self._num_chars = 0
        self._num_dropped = 0
        self._num_unwritten = 0
        self._is_ending = False
        self._is_broken = False
        self.is_complete = False
        """Whether the writer has finished, and every line came out."""
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)

    def start(self) -> None:
        """Start the thread that writes."""
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record over. Its traceback is rendered here, where it still exists."""
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        num_chars = _num_chars(record)
        with self._changed:
            if self._waiting and self._num_chars + num_chars > self._max_waiting_chars:
                self._num_dropped += 1
                return
            self._note_dropped()
            self._add(record, num_chars)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all lines are out; False if nobody took them in that time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._note_dropped()
            while self._num_unwritten and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return not self._num_unwritten and not self._is_broken

    def finish(self, timeout_s: float) -> None:
        """End the thread after the last line, or when nobody takes it in time."""
        self.is_complete = self.wait(timeout_s)
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        if not self._num_unwritten:  # else it is stuck in a write
            self._thread.join()

    def _note_dropped(self) -> None:
        """(With the lock.) Say how many lines are missing here."""
        if self._num_dropped:
            note = logging.makeLogRecord(
                {
                    "name": __name__,
                    "levelno": logging.WARNING,
                    "levelname": "WARNING",
                    "msg": "log lines are missing here: nobody read them",
                    "fields": {"count": self._num_dropped},
                }
            )
            self._num_dropped = 0
            self._add(note, RECORD_CHARS)

    def _add(self, record: logging.LogRecord, num_chars: int) -> None:
        self._waiting.append((record, num_chars))
        self._num_chars += num_chars
        self._num_unwritten += 1
        self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            tick_s = None if self._status is None else self._status.tick_s
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_ending, tick_s)
                is_ending = self._is_ending
                taken = self._waiting.popleft() if self._waiting and not is_ending else None
            if is_ending:
                self._print("" if self._status is None else self._status.erased())
                return
            if taken is None:  # a tick
                self._print("" if self._status is None else self._status.painted())
                continue
            record, num_chars = taken
            self._write(record)
            with self._changed:
                self._num_chars -= num_chars
                self._num_unwritten -= 1
                self._changed.notify_all()

    def _write(self, record: logging.LogRecord) -> None:
        if self._stream is None:
            return
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._print(f"{line}\n" if self._status is None else self._status.below(line, record))

    def _print(self, text: str) -> None:
        if self._stream is None or not text:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # its reader has gone, or somebody closed it
            self._is_broken = True


def _num_chars(record: logging.LogRecord) -> int:
    values: Mapping[str, object] = getattr(record, "fields", {})
    arguments = record.args if isinstance(record.args, tuple) else ()
    texts = (record.msg, record.exc_text, *values.values(), *arguments)
    return RECORD_CHARS + sum(len(text) for text in texts if isinstance(text, str))
