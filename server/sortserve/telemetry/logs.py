"""Structured logs: one line an event, for people or as JSON, written off the engine's thread.

An event is ``log.info("model loaded", extra=fields(layers=30))``. The root logger hands records to
one thread that writes them, so that a full pipe behind stderr never holds up a step or a signal.
Prompts and answers are no part of any line, unless the operator asked for them; what a client sends
can neither begin a line nor move a terminal's cursor.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

from sortserve.core.budget import Budget
from sortserve.core.request import Observer, RequestReport, StepRecord
from sortserve.telemetry.log_writer import LogWriter
from sortserve.telemetry.status_line import StatusLine, wants_status_line

__all__ = [
    "HumanFormatter",
    "JsonFormatter",
    "Observers",
    "RequestLogger",
    "fields",
    "logging_to",
    "report_fields",
]

PROBES = ("/health", "/readyz", "/livez", "/metrics")
"""Paths that machines ask for every few seconds: not worth a line each."""
LAST_LINES_S = 2.0
"""Seconds that the last lines get to be read."""


def fields(**values: object) -> dict[str, dict[str, object]]:
    """The ``extra`` argument of a logging call: values that belong to the event."""
    return {"fields": values}


class HumanFormatter(logging.Formatter):
    """``12:30:01 INFO request finished id=r1 output=12``, and a traceback below if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, except for tracebacks."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        parts = [time, f"{record.levelname:<7}", _printable(record.getMessage())]
        parts += [f"{_plain(name)}={_plain(value)}" for name, value in _fields_of(record).items()]
        traceback = (record.exc_text or "").splitlines()
        return "\n".join([" ".join(parts), *(f"  {_printable(line)}" for line in traceback)])


class JsonFormatter(logging.Formatter):
    """One JSON object: ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message`` and fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, tracebacks included."""
        event: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_text:
            event["traceback"] = record.exc_text
        return _printable(json.dumps(event, default=str, ensure_ascii=False))


class _NoProbes(logging.Filter):
    """Keeps uvicorn's access lines of probes out."""

    def filter(self, record: logging.LogRecord) -> bool:
        path = (
            str(record.args[2]) if isinstance(record.args, tuple) and len(record.args) > 2 else ""
        )
        return path.partition("?")[0] not in PROBES


@contextmanager
def logging_to(stream: TextIO | None = None, *, level: str, log_format: str) -> Iterator[LogWriter]:
    """Send every logger's lines to a stream (stderr by default) while the block runs.

    Python's warnings are lines too: printed as usual, they would block whoever meets one.

    Args:
        stream: where to.
        level: the least severe level to write, by name.
        log_format: ``human`` or ``json``.
    """
    formatter = JsonFormatter() if log_format == "json" else HumanFormatter()
    stream = stream if stream is not None else sys.stderr
    has_status = log_format == "human" and wants_status_line(stream)
    writer = LogWriter(stream, formatter, status=StatusLine() if has_status else None)
    root, access, no_probes = logging.getLogger(), logging.getLogger("uvicorn.access"), _NoProbes()
    level_before = root.level
    root.setLevel(level.upper())
    root.addHandler(writer)
    access.addFilter(no_probes)
    logging.captureWarnings(True)
    writer.start()
    try:
        yield writer
    finally:
        logging.captureWarnings(False)
        root.removeHandler(writer)
        access.removeFilter(no_probes)
        root.setLevel(level_before)
        writer.finish(LAST_LINES_S)  # after the last line is out


class RequestLogger:
    """Writes one line per finished or refused request. Implements ``Observer``."""

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._log = logger if logger is not None else logging.getLogger("sortserve.requests")

    def on_step(self, record: StepRecord) -> None:
        """Steps are for the metrics: hundreds a second are no reading matter."""

    def on_finished(self, report: RequestReport) -> None:
        """Tell the whole story of one request."""
        self._log.info("request finished", extra=fields(**report_fields(report)))

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """Tell that a request was refused, and why."""
        self._log.info(
            "request rejected",
            extra=fields(reason=reason, budget=_given(budget) if budget is not None else None),
        )

    def on_forecast_failed(self) -> None:
        """The desk writes it down itself, now and then."""

    def on_probe_step(self) -> None:
        """Nobody's step."""


class Observers:
    """Tells several observers, in order, what the engine tells one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def on_step(self, record: StepRecord) -> None:
        """A step is over."""
        for observer in self._observers:
            observer.on_step(record)

    def on_finished(self, report: RequestReport) -> None:
        """A request is over."""
        for observer in self._observers:
            observer.on_finished(report)

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """A request was refused before it entered the queue."""
        for observer in self._observers:
            observer.on_rejected(reason, budget)

    def on_forecast_failed(self) -> None:
        """No times could be predicted for a request."""
        for observer in self._observers:
            observer.on_forecast_failed()

    def on_probe_step(self) -> None:
        """A step has run for no request."""
        for observer in self._observers:
            observer.on_probe_step()


def report_fields(report: RequestReport) -> dict[str, object]:
    """What a log line says of a finished request: counts, times in ms, budget and exits used."""
    queue_ms = None if report.queue_s is None else round(report.queue_s * 1e3, 3)
    reply = report.budget_reply()
    return {
        "id": report.request_id,
        "finish": report.finish_reason.value,
        "prompt": report.num_prompt_tokens,
        "cached": report.num_cached_tokens,
        "output": report.num_output_tokens,
        "queue_ms": queue_ms,
        "ttft_ms": reply["ttft_ms"],
        "tpot_ms": reply["tpot_ms"],
        "e2e_ms": reply["actual_ms"],
        "exits": reply["tokens_by_exit"],
        "compute": reply["compute"],
        "preemptions": report.num_preemptions,
        "budget": _given(report.budget),
        "predicted_ttft_ms": reply["predicted_ttft_ms"],
        "predicted_tpot_ms": reply["predicted_tpot_ms"],
        "predicted_ms": reply["predicted_ms"],
        "met": reply["met"],
        "outcome": report.outcome,
        "degraded": report.degraded,
        "score": round(report.score, 4),
        "weight": report.weight,
    }


def _given(budget: Budget) -> dict[str, object]:
    """The bounds a client gave; ``on_miss`` only beside a time, since it acts on nothing else."""
    bounds: dict[str, object] = {kind: getattr(budget, kind) for kind in budget.kinds}
    if budget.schedule is not None:
        bounds["schedule"] = str(budget.schedule)
    return {**bounds, "on_miss": budget.on_miss.value} if budget.has_latency else bounds


def _fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    values: Mapping[str, Any] = getattr(record, "fields", {})
    return values


def _plain(value: object) -> str:
    """A value without spaces where it has none; anything odd as JSON, so a line stays a line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, Mapping):
        return ",".join(f"{_plain(k)}:{_plain(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ",".join(map(_plain, value)) or "-"
    text = str(value)
    is_plain = text.isprintable() and not any(character in text for character in ' ="')
    return text if is_plain and text else json.dumps(text)


def _printable(text: str) -> str:
    """The text with everything escaped, as in JSON, that would not print as a character."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
