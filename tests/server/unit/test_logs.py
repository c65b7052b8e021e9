"""Log lines: one an event, readable by people and by machines, never a prompt."""

from __future__ import annotations

import io
import json
import logging
import warnings
from dataclasses import replace
from typing import Any

import pytest

from sortserve.core.budget import Budget, OnMiss
from sortserve.core.request import Estimate, FinishReason, RequestReport, StepRecord
from sortserve.telemetry.logs import Observers, RequestLogger, fields, logging_to

REPORT = RequestReport(
    request_id="r1",
    budget=Budget(latency_ms=800, min_exit_layer=9, on_miss=OnMiss.TRUNCATE),
    finish_reason=FinishReason.LENGTH,
    num_prompt_tokens=26,
    num_cached_tokens=16,
    num_output_tokens=11,
    exit_layer=9,
    tokens_by_exit={18: 4, 9: 7},
    compute=0.57,
    predicted=Estimate(ttft_s=0.05, tpot_s=0.01, e2e_s=0.16),
    arrival_s=100.0,
    first_scheduled_s=100.01,
    first_token_s=100.06,
    last_token_s=100.26,
    finished_s=100.26,
    num_preemptions=1,
    outcome="met",
    degraded=True,
    score=0.625,
    weight=4.0,
)
LOG = logging.getLogger("sortserve.test")


def human(level: str = "info", **values: object) -> str:
    """The line that an event becomes, without its time."""
    stream = io.StringIO()
    with logging_to(stream, level=level, log_format="human"):
        LOG.info("happened", extra=fields(**values))
    return stream.getvalue().partition(" ")[2]


def finished(report: RequestReport, log_format: str) -> str:
    stream = io.StringIO()
    with logging_to(stream, level="info", log_format=log_format):
        RequestLogger().on_finished(report)
    return stream.getvalue()


def test_a_finished_request_is_one_line_of_json_with_its_whole_story() -> None:
    line = finished(REPORT, "json")

    event = json.loads(line)
    assert line.count("\n") == 1
    assert event["message"] == "request finished"
    assert event["level"] == "info"
    assert {name: event[name] for name in ("id", "finish", "prompt", "cached", "output")} == {
        "id": "r1",
        "finish": "length",
        "prompt": 26,
        "cached": 16,
        "output": 11,
    }
    assert event["queue_ms"] == pytest.approx(10)
    assert event["ttft_ms"] == pytest.approx(60)
    assert event["tpot_ms"] == pytest.approx(20)
    assert event["e2e_ms"] == pytest.approx(260)
    assert event["exits"] == {"18": 4, "9": 7}
    assert event["budget"] == {"latency_ms": 800, "min_exit_layer": 9, "on_miss": "truncate"}
    assert (event["predicted_ttft_ms"], event["predicted_ms"]) == (50, 160)
    assert (event["met"], event["outcome"], event["preemptions"]) == (True, "met", 1)
    assert (event["degraded"], event["score"], event["weight"]) == (True, 0.625, 4.0)


def test_a_finished_request_is_one_line_for_people() -> None:
    line = finished(REPORT, "human")

    assert line.count("\n") == 1
    assert " INFO    request finished id=r1 finish=length prompt=26 cached=16 output=11 " in line
    assert " exits=18:4,9:7 " in line
    assert " budget=latency_ms:800,min_exit_layer:9,on_miss:truncate " in line
    assert line.endswith(" met=yes outcome=met degraded=yes score=0.625 weight=4\n")


def test_what_never_happened_is_a_dash() -> None:
    ended = replace(
        REPORT, budget=Budget(), first_scheduled_s=None, first_token_s=None, last_token_s=None
    )

    line = finished(replace(ended, tokens_by_exit={}, predicted=None, outcome=None), "human")

    for part in ("queue_ms=-", "ttft_ms=-", "exits=-", "budget=-", "predicted_ms=-", "met=-"):
        assert f" {part}" in line


def test_a_refused_request_is_told_with_its_reason() -> None:
    stream = io.StringIO()

    with logging_to(stream, level="info", log_format="human"):
        RequestLogger().on_rejected("queue_full", None)
        RequestLogger().on_rejected("budget_unattainable", Budget(ttft_ms=3))

    first, second = stream.getvalue().splitlines()
    assert first.endswith("request rejected reason=queue_full budget=-")
    assert second.endswith(
        "request rejected reason=budget_unattainable budget=ttft_ms:3,on_miss:degrade"
    )


def test_a_clients_string_cannot_forge_a_line_or_a_field() -> None:
    forged = 'r1\n12:00:00 ERROR all is lost finish="stop"'

    assert human(id=forged) == f"INFO    happened id={json.dumps(forged)}\n"
    assert human(id="") == 'INFO    happened id=""\n'


ODD = "a\nb\rc\x1b[2Jd\x9b1me\x7ff\x85g\u2028h\u202ei\ud800j\0k"
"""Line ends and escape sequences of every kind, and a lone surrogate."""


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_nothing_that_a_client_sends_ends_a_line_or_commands_a_terminal(log_format: str) -> None:
    stream = io.StringIO()

    with logging_to(stream, level="info", log_format=log_format):
        LOG.info("asked for %s", ODD, extra=fields(id=ODD, **{ODD: 1}, nested={ODD: [ODD]}))

    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    if log_format == "json":
        assert json.loads(line)["id"] == ODD
        assert json.loads(line)["message"] == f"asked for {ODD}"


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_an_error_that_quotes_a_client_forges_no_line(log_format: str) -> None:
    stream = io.StringIO()

    with logging_to(stream, level="info", log_format=log_format):
        try:
            raise RuntimeError("bad value: x\n12:00:00 ERROR all is lost\x1b[2J")
        except RuntimeError:
            LOG.exception("failed")

    first, *others = stream.getvalue().splitlines()
    assert "failed" in first
    assert all(line.startswith("  ") for line in others)
    assert "\x1b" not in stream.getvalue()


def test_letters_of_every_language_stay_readable() -> None:
    assert human(answer="đêm-夜") == "INFO    happened answer=đêm-夜\n"


def test_a_warning_of_python_is_a_line_too() -> None:
    stream = io.StringIO()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with logging_to(stream, level="info", log_format="human"):
            warnings.warn("beware", UserWarning, stacklevel=1)

    assert "UserWarning: beware" in stream.getvalue()


def test_messages_below_the_level_are_not_written() -> None:
    assert human(level="warning", id="r1") == ""


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_a_traceback_is_written_whole(log_format: str) -> None:
    stream = io.StringIO()

    with logging_to(stream, level="info", log_format=log_format):
        try:
            raise RuntimeError("the wheel is bent")
        except RuntimeError:
            LOG.exception("failed")

    assert "the wheel is bent" in stream.getvalue()
    assert "test_logs.py" in stream.getvalue()


def test_every_line_is_out_when_logging_ends_and_none_comes_after() -> None:
    stream = io.StringIO()

    with logging_to(stream, level="info", log_format="human"):
        for number in range(100):
            LOG.info("line %d", number)
    LOG.warning("after")

    lines = stream.getvalue().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == [str(number) for number in range(100)]


def test_probes_are_kept_out_of_the_access_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    access = logging.getLogger("uvicorn.access")
    # A uvicorn without an access log, in whatever test ran before, has silenced the logger.
    monkeypatch.setattr(access, "propagate", True)

    with logging_to(stream, level="info", log_format="human"):
        for path in ("/health", "/metrics?x=1", "/generate"):
            access.info('%s - "%s %s HTTP/%s" %d', "::1", "GET", path, "1.1", 200)

    assert stream.getvalue().count("\n") == 1
    assert "/generate" in stream.getvalue()


def test_observers_are_all_told_in_order() -> None:
    told: list[tuple[str, str]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def on_step(self, record: StepRecord) -> None:
            told.append((self.name, "step"))

        def on_finished(self, report: RequestReport) -> None:
            told.append((self.name, report.request_id))

        def on_rejected(self, reason: str, budget: Budget | None) -> None:
            told.append((self.name, reason))

        def on_forecast_failed(self) -> None:
            told.append((self.name, "forecast failed"))

        def on_probe_step(self) -> None:
            told.append((self.name, "probe"))

    both = Observers([Recorder("a"), Recorder("b")])
    step: Any = None

    both.on_step(step)
    both.on_finished(REPORT)
    both.on_rejected("queue_full", None)
    both.on_forecast_failed()
    both.on_probe_step()

    events = ("step", "r1", "queue_full", "forecast failed", "probe")
    assert told == [(name, event) for event in events for name in ("a", "b")]
