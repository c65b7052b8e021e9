"""A log never waits for its reader, and says what it lost."""

from __future__ import annotations

import io
import logging
import threading

from sortserve.telemetry.log_writer import RECORD_CHARS, LogWriter

FORMATTER = logging.Formatter("%(message)s")


def record(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "levelno": logging.INFO, "levelname": "INFO"})


class Blocked(io.StringIO):
    """A stream whose reader sleeps until it is told to read."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = threading.Event()
        self.is_waiting = threading.Event()

    def write(self, text: str) -> int:
        self.is_waiting.set()
        self.reading.wait()
        return super().write(text)


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


def test_what_piles_up_before_a_sleeping_reader_is_bounded_and_what_is_lost_is_counted() -> None:
    stream = Blocked()
    writer = LogWriter(stream, FORMATTER, max_waiting_chars=3 * RECORD_CHARS + 10)
    writer.start()
    writer.emit(record("0"))
    stream.is_waiting.wait()

    for number in range(1, 1000):
        writer.emit(record(str(number)))
    stream.reading.set()
    assert writer.wait(30)
    writer.emit(record("after"))
    writer.finish(30)

    lines = stream.getvalue().splitlines()
    assert writer.is_complete
    assert lines == ["0", "1", "2", "log lines are missing here: nobody read them", "after"]


def test_the_note_counts_what_was_lost() -> None:
    stream = Blocked()
    formatter = logging.Formatter("%(message)s %(fields)s", defaults={"fields": {}})
    writer = LogWriter(stream, formatter, max_waiting_chars=1)
    writer.start()
    writer.emit(record("0"))
    stream.is_waiting.wait()
    for number in range(10):
        writer.emit(record(str(number)))

    stream.reading.set()
    writer.finish(30)

    assert "nobody read them {'count': 9}" in stream.getvalue()


def test_long_texts_count_by_their_length() -> None:
    stream = Blocked()
    writer = LogWriter(stream, FORMATTER, max_waiting_chars=1 << 20)
    writer.start()

    for _ in range(100):
        writer.emit(record("x" * 100_000))

    assert writer._num_chars < 1.2 * (1 << 20)
    stream.reading.set()
    writer.finish(30)


def test_an_end_does_not_wait_for_a_reader_that_sleeps() -> None:
    stream = Blocked()
    writer = LogWriter(stream, FORMATTER)
    writer.start()
    writer.emit(record("0"))

    writer.finish(0.01)

    assert not writer.is_complete
    stream.reading.set()


def test_a_reader_that_has_gone_is_no_error_and_is_remembered() -> None:
    writer = LogWriter(Broken(), FORMATTER)
    writer.start()
    writer.emit(record("0"))

    writer.finish(30)

    assert not writer.is_complete


def test_without_a_stream_there_is_nothing_to_wait_for() -> None:
    writer = LogWriter(None, FORMATTER)
    writer.start()
    writer.emit(record("0"))

    writer.finish(30)

    assert writer.is_complete


def test_a_record_that_cannot_be_formatted_does_not_end_the_log() -> None:
    stream = io.StringIO()
    writer = LogWriter(stream, FORMATTER)
    writer.handleError = lambda record: None  # type: ignore[method-assign]
    writer.start()
    writer.emit(logging.makeLogRecord({"msg": "%d", "args": ("x",)}))
    writer.emit(record("after"))

    writer.finish(30)

    assert stream.getvalue() == "after\n"
