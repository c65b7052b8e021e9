"""A failure stays with the request that caused it, and a broken engine says so."""

from __future__ import annotations

from typing import Any

import pytest

from sortserve.core.budget import Budget, OnMiss
from sortserve.core.request import Request, RequestReport, StepRecord
from sortserve.core.sequence import Sequence
from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, StepShape
from sortserve.engine.engine import Engine
from sortserve.engine.stall import StallDetector
from sortserve.telemetry.metrics import Metrics
from support.faults import FaultyRunner
from support.scripted import (
    AsciiText,
    Collected,
    FakeClock,
    add,
    go_shallower,
    make_engine,
    make_request,
    run,
)
from support.timed import MODEL

NEIGHBOURS = ("left", "right")


class Records:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.reports: list[RequestReport] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_finished(self, report: RequestReport) -> None:
        self.reports.append(report)

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        raise AssertionError("nothing is refused here")

    def on_forecast_failed(self) -> None:
        raise AssertionError("nothing is predicted here")

    def on_probe_step(self) -> None:
        raise AssertionError("nothing is probed here")


def run_three(runner: FaultyRunner, **options: Any) -> tuple[dict[str, Collected], Records]:
    """The results of a request called guilty between two neighbours."""
    records = Records()
    model = options.pop("cost_model", None)
    engine = make_engine(runner=runner, observer=records, **options)
    engine.costs.use(model)
    for name in ("left", "guilty", "right"):
        add(engine, make_request(name, max_tokens=4))
    return run(engine), records


def error_of(result: Collected) -> str | None:
    assert result.last is not None
    return None if result.last.error is None else str(result.last.error)


def test_a_row_that_raises_ends_alone_and_its_neighbours_get_their_tokens() -> None:
    results, records = run_three(FaultyRunner(guilty=["guilty"]))

    assert error_of(results["guilty"]) == (
        "The model failed on this request: exception (RuntimeError)."
    )
    assert [results[name].text for name in NEIGHBOURS] == ["bcde", "bcde"]
    assert [dict(r.failed_rows) for r in records.steps if r.failed_rows] == [{"exception": 1}]


def test_a_row_whose_scores_are_not_finite_ends_alone() -> None:
    results, records = run_three(FaultyRunner(not_finite=["guilty"]))

    assert error_of(results["guilty"]) == "The model failed on this request: non_finite."
    assert [results[name].text for name in NEIGHBOURS] == ["bcde", "bcde"]
    assert [dict(r.failed_rows) for r in records.steps if r.failed_rows] == [{"non_finite": 1}]


class FaultyText(AsciiText):
    def push(self, token_id: int) -> tuple[str, bool]:
        raise RuntimeError("a scripted fault")

    def finish(self) -> str:
        raise RuntimeError("a scripted fault")


def test_a_row_whose_token_cannot_be_made_text_ends_alone() -> None:
    def make_text(request: Request) -> AsciiText:
        kind = FaultyText if request.request_id == "guilty" else AsciiText
        return kind(request.sampling)

    results, records = run_three(FaultyRunner(), make_text=make_text)

    assert error_of(results["guilty"]) == "The model failed on this request: text (RuntimeError)."
    assert [results[name].text for name in NEIGHBOURS] == ["bcde", "bcde"]
    assert [dict(r.failed_rows) for r in records.steps if r.failed_rows] == [{"text": 1}]


def test_a_request_that_cannot_take_its_token_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    append = Sequence.append_token

    def faulty(sequence: Sequence, *args: Any, **kwargs: Any) -> None:
        if sequence.request_id == "guilty":
            raise RuntimeError("a scripted fault")
        append(sequence, *args, **kwargs)

    monkeypatch.setattr(Sequence, "append_token", faulty)

    results, records = run_three(FaultyRunner())

    assert error_of(results["guilty"]) == (
        "The model failed on this request: exception (RuntimeError)."
    )
    assert [results[name].text for name in NEIGHBOURS] == ["bcde", "bcde"]
    assert [dict(r.failed_rows) for r in records.steps if r.failed_rows] == [{"exception": 1}]


def test_a_request_without_a_report_gets_its_answer_and_gives_all_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sortserve.engine.live.make_report", lambda *args, **kwargs: 1 / 0)
    records = Records()
    engine = make_engine(observer=records)
    add(engine, make_request("r"))

    result = run(engine)["r"]

    assert result.text == "bcde"
    assert result.last is not None
    assert result.last.finish_reason is not None
    assert result.last.report is None
    assert records.reports == []
    assert engine.stats().kv_pages_used == 0


def test_a_text_without_its_end_still_ends() -> None:
    engine = make_engine(make_text=lambda request: FaultyText(request.sampling))
    add(engine, make_request("r"))

    last = engine.abort("r")

    assert last is not None
    assert (last.finish_reason, last.text) == ("abort", "")
    engine.check_invariants()


def test_a_step_that_fails_once_costs_nobody_anything() -> None:
    runner = FaultyRunner()
    runner.fail_next = True

    results, records = run_three(runner, cost_model=MODEL)

    assert [results[name].text for name in ("left", "guilty", "right")] == ["bcde"] * 3
    assert not any(record.failed_rows for record in records.steps)
    assert [record.was_retried for record in records.steps] == [True, False, False, False]
    assert records.steps[0].predicted_s is None  # it took the time of two


def test_steps_that_were_run_again_are_counted_whatever_came_of_it() -> None:
    runner = FaultyRunner()
    metrics = Metrics("tiny", (2, 4, 6), version="1")
    engine = make_engine(runner=runner, observer=metrics)
    for name in ("left", "right"):
        add(engine, make_request(name))
    runner.fail_next = True

    run(engine)

    text = metrics.render()[0].decode()
    assert 'sortserve_retried_steps_total{model_name="tiny"} 1.0' in text
    assert 'sortserve_failed_steps_total{model_name="tiny"} 0.0' in text


def test_a_runner_that_answers_for_too_few_rows_has_failed() -> None:
    class Forgetful(FaultyRunner):
        def execute(self, plan: Any) -> list[Any]:
            results = super().execute(plan)
            return results[:-1] if len(plan.rows) > 1 else results

    results, _ = run_three(Forgetful())

    assert [results[name].text for name in ("left", "guilty", "right")] == ["bcde"] * 3


def test_what_a_failed_step_preempted_and_lowered_is_counted_once() -> None:
    runner = FaultyRunner(guilty=["guilty"])
    records = Records()
    engine = make_engine(runner=runner, observer=records)
    add(engine, make_request("guilty"))
    go_shallower(engine, "guilty", 2, "behind")
    engine.step()
    add(engine, make_request("next"))

    run(engine)

    assert [record.exit_changes for record in records.steps][:2] == [((6, 2, "behind"),), ()]
    assert records.steps[0].rows_by_exit == {}


def test_nobody_reuses_what_a_request_computed_that_was_not_finite() -> None:
    prompt = "abcdefghijklmnop"
    runner = FaultyRunner()
    engine = make_engine(runner=runner, max_num_batched_tokens=8)
    add(engine, make_request("healthy", prompt, max_tokens=1))
    run(engine)
    add(engine, make_request("poisoned", prompt, max_tokens=1))
    runner.not_finite = {"poisoned"}
    run(engine)

    records = Records()
    engine.observer = records
    add(engine, make_request("after", prompt, max_tokens=1))
    results = run(engine)

    assert results["after"].text == "q"
    assert records.reports[0].num_cached_tokens == 0


def test_an_observer_that_raises_harms_nobody() -> None:
    class Faulty(Records):
        def on_step(self, record: StepRecord) -> None:
            raise RuntimeError("a scripted fault")

        def on_finished(self, report: RequestReport) -> None:
            raise RuntimeError("a scripted fault")

    engine = make_engine(observer=Faulty())
    add(engine, make_request("r"))

    assert run(engine)["r"].text == "bcde"


def test_a_learner_that_raises_leaves_the_cost_model_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = StepShape(num_layers=6, num_tokens=1, layer_tokens=6, layer_kv_tokens=6, num_sampled=1)
    learner = CostLearner([(shape, 0.01)])
    engine = make_engine()
    engine.costs.learn_from(learner)
    model = engine.costs.model
    monkeypatch.setattr(learner, "observe", lambda *args: 1 / 0)
    add(engine, make_request("r"))

    assert run(engine)["r"].text == "bcde"
    assert engine.costs.model is model


class EndlessText(AsciiText):
    """Gives text, but not what it held back."""

    def finish(self) -> str:
        raise RuntimeError("a scripted fault")


@pytest.mark.parametrize("max_tokens", [1, 4])
def test_an_answer_without_its_end_is_a_failure_and_not_a_shorter_answer(max_tokens: int) -> None:
    records = Records()
    engine = make_engine(observer=records, make_text=lambda r: EndlessText(r.sampling))
    add(engine, make_request("r", max_tokens=max_tokens, stop=("xyz",)))

    results = run(engine)

    assert error_of(results["r"]) == "The model failed on this request: text (RuntimeError)."
    assert records.reports[0].finish_reason == "error"
    assert dict(records.steps[-1].failed_rows) == {"text": 1}


def test_an_answer_cut_by_its_deadline_fails_too_without_its_end() -> None:
    clock = FakeClock()
    engine = make_engine(clock=clock, make_text=lambda r: EndlessText(r.sampling))
    budget = Budget(latency_ms=1000, on_miss=OnMiss.TRUNCATE)
    add(engine, make_request("late", max_tokens=50, budget=budget))
    add(engine, make_request("next", max_tokens=50))
    engine.step()
    clock.now += 2.0

    outputs = {output.request_id: output for output in engine.step()}

    assert str(outputs["late"].error) == "The model failed on this request: text (RuntimeError)."
    assert outputs["next"].error is None
    engine.check_invariants()


@pytest.mark.parametrize("part", ["step_s", "line"])
def test_a_cost_model_that_raises_costs_nobody_an_answer(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(observer=Records())
    engine.costs.use(MODEL)
    monkeypatch.setattr(CostModel, part, lambda *args: 1 / 0)
    add(engine, make_request("r"))

    assert run(engine)["r"].text == "bcde"


def test_a_request_that_cannot_be_queued_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "add", lambda sequence: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            add(engine, make_request("r"))

    engine.check_invariants()
    add(engine, make_request("r"))
    assert run(engine)["r"].text == "bcde"


# ---- a broken engine ----


def send(engine: Engine, name: str) -> None:
    add(engine, make_request(name, max_tokens=1))
    engine.step()
    engine.check_health()


def test_an_engine_that_runs_nothing_any_more_fails_after_so_many_steps() -> None:
    runner = FaultyRunner()
    engine = make_engine(runner=runner, max_failed_steps=3)
    runner.is_broken = True

    failures = []
    for i in range(3):
        send(engine, str(i))
        failures.append(engine.failure)

    assert failures[:2] == [None, None]
    assert failures[2] == "3 steps in a row failed, self-tests included"


def test_requests_that_no_engine_can_serve_never_end_it() -> None:
    runner = FaultyRunner(guilty=[str(i) for i in range(20)])
    engine = make_engine(runner=runner, max_failed_steps=3)

    for i in range(20):
        send(engine, str(i))

    assert engine.failure is None
    add(engine, make_request("healthy"))
    assert run(engine)["healthy"].text == "bcde"


def test_a_step_that_works_forgives_those_before() -> None:
    runner = FaultyRunner()
    engine = make_engine(runner=runner, max_failed_steps=3)
    for _ in range(4):
        runner.is_broken = True
        send(engine, "lost")
        send(engine, "lost, too")
        runner.is_broken = False
        send(engine, "served")

    assert engine.failure is None


def test_the_self_test_leaves_no_page_behind() -> None:
    runner = FaultyRunner(guilty=["guilty"])
    engine = make_engine(runner=runner)

    send(engine, "guilty")

    assert runner.plans[-1].rows[0].request_id == "self-test"
    assert engine.kv_cache.pool.num_used == 0
    engine.check_invariants()


def test_scores_that_are_never_finite_end_the_engine_however_long_the_prompts() -> None:
    """A step that only reads a part of a prompt gives no token, so it says nothing of them."""
    names = [str(i) for i in range(3)]
    engine = make_engine(
        runner=FaultyRunner(not_finite=[*names, "self-test"]),
        max_failed_steps=3,
        max_num_batched_tokens=8,
    )
    for name in names:
        add(engine, make_request(name, "a" * 20))

    while engine.has_work:
        engine.step()
        engine.check_health()

    assert engine.failure == "3 steps in a row failed, self-tests included"


def test_a_part_of_a_prompt_beside_rows_without_tokens_forgives_nothing() -> None:
    names = [str(i) for i in range(3)]
    runner = FaultyRunner(not_finite=[*names, "self-test"])
    engine = make_engine(runner=runner, max_failed_steps=3, max_num_batched_tokens=8)
    add(engine, make_request("long", "a" * 200))
    engine.step()
    for name in names:
        add(engine, make_request(name, "a"))
        engine.step()
        engine.check_health()

    assert engine.failure == "3 steps in a row failed, self-tests included"


def test_where_no_page_is_free_for_a_self_test_the_step_counts_for_nothing() -> None:
    """Three requests that no engine can serve, while others hold all the pages."""
    guilty = ("g0", "g1", "g2")
    runner = FaultyRunner(guilty=guilty)
    runner.num_pages = 6
    engine = make_engine(runner=runner, max_failed_steps=3, enable_prefix_caching=False)
    held = engine.kv_cache.pool.allocate(4)
    for name in guilty:
        add(engine, make_request(name, "a"), exit_layer=2)
        engine.step()
        engine.check_health()

    assert engine.failure is None
    engine.kv_cache.pool.release(held, keep=lambda page: False)
    add(engine, make_request("healthy"))
    assert run(engine)["healthy"].text == "bcde"


# ---- a stall ----


def test_a_thread_that_gets_on_is_not_stuck_however_long_it_works() -> None:
    detector = StallDetector(timeout_s=10.0, poll_s=1.0)

    assert not any(detector.look(pulse=i // 9, now=float(i)) for i in range(1000))


def test_a_thread_is_stuck_once_the_same_work_has_lasted_too_long() -> None:
    detector = StallDetector(timeout_s=10.0, poll_s=1.0)

    stuck = [detector.look(pulse=7, now=float(i)) for i in range(13)]

    assert stuck == [False] * 11 + [True] * 2


def test_a_thread_without_work_is_not_stuck() -> None:
    detector = StallDetector(timeout_s=10.0, poll_s=1.0)

    assert not any(detector.look(pulse=None, now=float(i)) for i in range(100))


def test_time_in_which_nobody_looked_does_not_count() -> None:
    detector = StallDetector(timeout_s=10.0, poll_s=1.0)
    detector.look(pulse=7, now=0.0)
    detector.look(pulse=7, now=1.0)

    assert not detector.look(pulse=7, now=10_000.0)
