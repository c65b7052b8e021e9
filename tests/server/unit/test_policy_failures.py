"""A policy or a forecast that fails: a plain rule stands in, nobody loses an answer, it is told."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest

from sortserve.core.budget import Budget
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.request import RequestReport, StepRecord
from sortserve.scheduling.failures import LOG_EVERY_S, FailureLog
from sortserve.scheduling.policies.deadline import deadline
from sortserve.scheduling.policies.table import get_policy
from sortserve.scheduling.policy import Situation, StepChoice
from sortserve.telemetry.metrics import Metrics
from support.timed import Timed, make_timed, timed_request

DECISIONS = (
    "choose",
    "cap",
    "lower",
    "entry_order",
    "victim",
    "demand_of",
    "none of them",
)


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.num_forecasts_failed = 0

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)

    def on_finished(self, report: RequestReport) -> None:
        """Nothing of interest."""

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        """Nothing of interest."""

    def on_forecast_failed(self) -> None:
        self.num_forecasts_failed += 1

    def on_probe_step(self) -> None:
        """Nothing of interest."""

    @property
    def num_failed(self) -> int:
        return sum(record.policy_failed for record in self.records)


def broken(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("float division by zero")


def busy(recorder: Recorder, policy: str = "deadline") -> Timed:
    """So few pages and so little time that every decision is asked for."""
    timed = make_timed(policy=policy, num_pages=66, max_num_seqs=5, observer=recorder)
    timed.check_every = 1
    return timed


def serve_all(timed: Timed) -> dict[str, RequestReport]:
    """Eight requests, with and without budgets of time, through to their ends."""
    timed.run(
        [
            timed_request("plain", 30, max_tokens=30),
            timed_request("soft", 4, max_tokens=30, min_exit_layer=4),
            timed_request("loose", 20, max_tokens=25, latency_ms=900),
            *(
                timed_request(f"t{i}", 12, max_tokens=20, latency_ms=260, at=0.02 * i)
                for i in range(5)
            ),
        ]
    )
    return timed.reports


def break_decision(timed: Timed, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = timed.engine.scheduler._decisions
    if name == "demand_of":
        monkeypatch.setattr("sortserve.scheduling.decisions.demand_of", broken)
    elif name != "none of them":
        changed: dict[str, Any] = {name: broken}
        decisions.policy = dataclasses.replace(decisions.policy, **changed)


@pytest.mark.parametrize("name", DECISIONS)
def test_whatever_decision_fails_everybody_is_answered_in_full_and_the_step_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    timed = busy(recorder, "fair" if name == "cap" else "deadline")
    break_decision(timed, name, monkeypatch)

    reports = serve_all(timed)

    lengths = {id_: report.num_output_tokens for id_, report in reports.items()}
    assert lengths == {"plain": 30, "soft": 30, "loose": 25, **{f"t{i}": 20 for i in range(5)}}
    assert not timed.errors
    assert timed.engine.stats().kv_pages_used == 0
    assert (recorder.num_failed > 0) is (name != "none of them")


def test_a_step_is_told_of_once_and_the_next_one_is_the_policys_again() -> None:
    recorder = Recorder()
    timed = busy(recorder)
    calls = iter([broken])
    decisions = timed.engine.scheduler._decisions
    decisions.policy = dataclasses.replace(
        decisions.policy, choose=lambda situation: next(calls, deadline)(situation)
    )
    timed.arrive(timed_request("r", 4, max_tokens=3))

    for _ in range(3):
        timed.step()

    assert [record.policy_failed for record in recorder.records] == [True, False, False]


@pytest.mark.parametrize(
    "choose",
    [
        lambda situation: StepChoice(6, (), 64),
        lambda situation: StepChoice(6, ("nobody",), 64),
        lambda situation: StepChoice(2, tuple(d.request_id for d in situation.rows), 64),
        lambda situation: StepChoice(6, ("prompt",), 0),
        lambda situation: StepChoice(6, ("prompt",), 1.5),  # type: ignore[arg-type]
        lambda situation: None,
    ],
    ids=["nobody", "a stranger", "too deep", "no tokens", "half a token", "nothing"],
)
def test_a_choice_that_no_step_can_be_made_of_counts_as_a_failure(
    choose: Callable[[Situation], StepChoice],
) -> None:
    recorder = Recorder()
    timed = busy(recorder)
    timed.engine.scheduler._decisions.policy = dataclasses.replace(
        get_policy("deadline"), choose=choose
    )
    timed.arrive(timed_request("prompt", 30, max_tokens=2, exit_layer=6))

    timed.step()

    assert [record.policy_failed for record in recorder.records] == [True]
    assert timed.runner.plans[0].num_tokens == 30


@pytest.mark.parametrize(
    "lowerings",
    [
        [("nobody", 2)],
        [("r", 2)],
        [("r", 6)],
        [("r", 5)],
        [("r",)],
        [("r", 4), ("r", 4)],
    ],
)
def test_a_lowering_that_is_not_allowed_counts_as_a_failure_and_is_not_made(
    lowerings: list[Any],
) -> None:
    recorder = Recorder()
    timed = busy(recorder)
    timed.engine.scheduler._decisions.policy = dataclasses.replace(
        get_policy("deadline"), lower=lambda *args, **kwargs: lowerings
    )
    timed.arrive(timed_request("r", max_tokens=3, min_exit_layer=4))

    timed.run()

    assert timed.reports["r"].tokens_by_exit == {6: 3}
    assert recorder.num_failed == 3


def test_failures_are_counted_in_the_metrics() -> None:
    metrics = Metrics("tiny", (2, 4, 6), version="1")
    timed = make_timed(observer=metrics)
    timed.engine.scheduler._decisions.policy = dataclasses.replace(
        get_policy("deadline"), choose=broken
    )
    timed.arrive(timed_request("r", max_tokens=3))

    timed.run()
    metrics.on_forecast_failed()

    text = metrics.render()[0].decode()
    assert 'sortserve_policy_failures_total{model_name="tiny"} 4.0' in text


def test_a_policy_that_always_fails_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    timed = make_timed()
    timed.engine.scheduler._decisions.policy = dataclasses.replace(
        get_policy("deadline"), choose=broken
    )

    timed.run([timed_request("r", max_tokens=100)])

    (line,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "the policy deadline failed: fair stood in" in line.getMessage()
    assert line.exc_info is not None


def test_a_minute_later_the_log_says_how_often_it_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = FailureLog(logging.getLogger("test"), "it failed")

    for now in (0.0, 1.0, 59.0, LOG_EVERY_S, LOG_EVERY_S + 1):
        failures.add(ValueError(), now)

    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "it failed (1 since the last such line)",
        "it failed (3 since the last such line)",
    ]


# ---- admission ----


@pytest.mark.parametrize("name", ["forecast", "Newcomer", "next_level"])
@pytest.mark.parametrize("on_miss", ["reject", "degrade"])
def test_a_request_that_nothing_can_be_predicted_for_gets_its_deepest_exit_and_no_promise(
    name: str, on_miss: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    budget: dict[str, Any] = {"latency_ms": 900, "on_miss": on_miss}
    if name == "next_level":
        budget = {}
    monkeypatch.setattr(f"sortserve.admission.desk.{name}", broken)
    recorder = Recorder()
    timed = make_timed(overload_delay_s=2.0, overload_degrade=True)
    timed.desk.on_failure = recorder.on_forecast_failed

    timed.run([timed_request("r", compute=0.9, max_tokens=5, **budget)])

    choice = timed.choices["r"]
    assert (choice.exit_layer, choice.floor_layer) == (4, 2)
    assert (choice.estimate, choice.promise, choice.fits) == (None, None, not budget)
    assert timed.reports["r"].num_output_tokens == 5
    assert recorder.num_forecasts_failed == 1
    assert "nothing was promised" in caplog.text


def test_a_refusal_stands_where_only_the_time_to_come_back_cannot_be_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sortserve.admission.desk.predicted_drain_s", broken)
    timed = make_timed()
    timed.run([timed_request("r", max_tokens=100, latency_ms=1, on_miss="reject")])

    refusal = timed.refusals["r"]
    assert isinstance(refusal, BudgetUnattainableError)
    assert refusal.retry_after_s is not None
    assert refusal.retry_after_s >= 1.0


def test_estimates_and_queue_delays_that_fail_are_none_and_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = make_timed()
    timed.arrive(timed_request("r", 50))
    monkeypatch.setattr("sortserve.admission.desk.forecast", broken)
    monkeypatch.setattr("sortserve.admission.desk.Load", broken)

    assert timed.desk.estimate(6, 10, 10) is None


def test_a_request_enters_although_its_demand_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = make_timed()
    request = timed_request("r")
    choice = timed.desk.choose(request, (2, 4, 6))
    monkeypatch.setattr("sortserve.admission.desk.newcomer_demand", broken)

    timed.desk.enter(request, choice)

    assert timed.desk.load().demands == ()
