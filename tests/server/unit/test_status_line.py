"""The last line of a terminal says what takes so long while a server starts."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest

from sortserve.telemetry.log_writer import LogWriter
from sortserve.telemetry.logs import fields, logging_to
from sortserve.telemetry.status_line import (
    ERASE,
    StatusLine,
    phase,
    phase_over,
    wants_status_line,
)

FORMATTER = logging.Formatter("%(message)s")


def record(text: str, extra: dict[str, Any] | None = None) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"msg": text, "levelno": logging.INFO, "levelname": "INFO", **(extra or {})}
    )


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_phase_stands_below_the_log_with_its_seconds_until_it_ends() -> None:
    clock = Clock()
    status = StatusLine(clock)

    began = status.below("begins", record("begins", phase("loading")))
    clock.now = 3.4
    ticked = status.painted()
    line = status.below("a line", record("a line"))
    ended = status.below("ready", record("ready", fields(port=1) | phase_over()))

    assert began == f"begins\n{ERASE}... loading: 0 s"
    assert ticked == f"{ERASE}... loading: 3 s"
    assert line == f"{ERASE}a line\n{ERASE}... loading: 3 s"
    assert ended == f"{ERASE}ready\n"
    assert status.below("later", record("later")) == "later\n"


def test_each_phase_counts_from_its_own_beginning() -> None:
    clock = Clock()
    status = StatusLine(clock)
    status.below("1", record("1", phase("loading")))
    clock.now = 5.0

    status.below("2", record("2", phase("timing")))
    clock.now = 6.0

    assert status.painted() == f"{ERASE}... timing: 1 s"


def test_phases_that_overlap_stand_there_until_each_is_over() -> None:
    status = StatusLine(Clock())
    for name in ("loading", "compiling", "converting"):
        status.below("begins", record("begins", phase(name)))

    shown = [status.painted()]
    for name in ("compiling", "converting", "never begun", "loading"):
        status.below("ends", record("ends", phase_over(name)))
        shown.append(status.painted())

    assert [text.removeprefix(f"{ERASE}... ") for text in shown] == [
        "converting: 0 s",
        "converting: 0 s",
        "loading: 0 s",
        "loading: 0 s",
        "",
    ]


def test_a_name_can_neither_wrap_the_line_nor_move_the_cursor() -> None:
    status = StatusLine(Clock())

    status.below("begins", record("begins", phase("a\033[2J" + "x" * 200)))

    shown = status.painted().removeprefix(ERASE)
    assert shown.isprintable()
    assert len(shown) < 80


def test_it_is_painted_again_only_while_there_is_a_phase() -> None:
    status = StatusLine(Clock())
    assert status.tick_s is None
    assert status.painted() == status.erased() == ""

    status.below("1", record("1", phase("loading")))

    assert status.tick_s is not None


def test_a_log_that_ends_within_a_phase_takes_its_line_away() -> None:
    """As a start does that fails: what is said of it begins a line of its own."""
    stream = io.StringIO()
    writer = LogWriter(stream, FORMATTER, status=StatusLine(Clock()))
    writer.start()
    writer.emit(record("begins", phase("loading")))

    writer.finish(30)

    assert writer.is_complete
    assert stream.getvalue().startswith("begins\n")
    assert stream.getvalue().endswith(ERASE)


def test_a_stream_that_is_no_terminal_gets_lines_alone() -> None:
    stream = io.StringIO()

    with logging_to(stream, level="info", log_format="human"):
        logging.getLogger("sortserve.test").info("begins", extra=phase("loading"))

    assert "begins" in stream.getvalue()
    assert "\033" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("term", "log_format", "expected"),
    [("xterm", "human", True), ("dumb", "human", False), ("xterm", "json", False)],
)
def test_a_terminal_gets_the_line_if_it_can_take_it_back_and_a_person_reads(
    term: str, log_format: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    stream = Terminal()

    with logging_to(stream, level="info", log_format=log_format):
        logging.getLogger("sortserve.test").info("begins", extra=phase("loading"))

    assert (ERASE in stream.getvalue()) is expected
    assert not wants_status_line(None)
