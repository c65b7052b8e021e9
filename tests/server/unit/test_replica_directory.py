"""What a router knows of its replicas, how many there should be, and their metrics as one text."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

from sortserve.core.budget import Budget
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.request import AdmissionStats, EngineStats
from sortserve.replicas.choice import Choice, Ranked, RoutedRequest
from sortserve.replicas.directory import Directory
from sortserve.replicas.exposition import merged
from sortserve.replicas.load import EngineLoad, ExitLoad
from sortserve.replicas.messages import ReplicaReport
from sortserve.replicas.scaling import wanted_replicas
from support.scripted import FakeClock

ROUTED = RoutedRequest(arrival_s=0.0, num_prompt_tokens=4, num_output_tokens=4, budget=Budget())


def report(time_s: float = 0.0, state: str = "ready") -> ReplicaReport:
    exits = (ExitLoad(exit_layer=6, score=1.0, compute=1.0),)
    return ReplicaReport(
        state=state,
        load=EngineLoad(time_s=time_s, exits=exits, is_calibrated=False),
        stats=EngineStats(),
        admission=AdmissionStats(),
    )


def by_what_was_sent(candidates: Any, request: Any, **_: Any) -> Choice:
    ids = sorted(candidates, key=lambda own: (len(own.sent), own.replica_id))
    return Choice(ranked=tuple(Ranked(replica_id=own.replica_id, exit_layer=6) for own in ids))


def test_what_was_sent_counts_until_a_report_knows_of_it() -> None:
    clock = FakeClock()
    directory = Directory(clock, by_what_was_sent)
    directory.update({"a": report(), "b": report()})

    directory.begin("r")
    directory.send("a", "r", ROUTED)
    assert directory.rank(ROUTED, ["a", "b"]) == ["b", "a"]
    clock.now += 1.0
    directory.update({"a": report(1.0), "b": report(1.0)})
    assert directory.rank(ROUTED, ["a", "b"]) == ["a", "b"]

    directory.end("r")
    directory.check_invariants()


def test_a_report_that_may_be_older_than_what_was_sent_does_not_know_of_it() -> None:
    clock = FakeClock()
    directory = Directory(clock, by_what_was_sent, report_lag_s=0.3)
    directory.update({"a": report(), "b": report()})
    directory.begin("r")
    directory.send("a", "r", ROUTED)

    clock.now += 0.2
    directory.update({"a": report(1.0), "b": report(1.0)})

    assert directory.rank(ROUTED, ["a", "b"]) == ["b", "a"]


def test_requests_of_one_moment_know_of_each_other_and_move() -> None:
    directory = Directory(FakeClock(), by_what_was_sent)
    for key in ("r", "s"):
        directory.begin(key)
        directory.send(directory.rank(ROUTED, ["a", "b"])[0], key, ROUTED)
    assert [directory.place_of(key) for key in ("r", "s")] == ["a", "b"]

    directory.send("b", "r", ROUTED)

    assert directory.rank(ROUTED, ["a", "b"]) == ["a", "b"]
    directory.end("r")
    directory.end("s")
    directory.send("b", "s", ROUTED)  # Ray has chosen too late: it is given up
    assert directory.rank(ROUTED, ["a", "b"]) == ["a", "b"]
    assert directory.place_of("r") is None
    directory.check_invariants()


def test_who_has_refused_is_asked_again_only_if_there_is_nobody_else() -> None:
    directory = Directory(FakeClock(), by_what_was_sent)

    assert directory.rank(ROUTED, ["a", "b"], not_to={"a"}) == ["b"]
    assert directory.rank(ROUTED, ["a"], not_to={"a"}) == ["a"]


def test_who_says_that_it_takes_nothing_comes_last() -> None:
    directory = Directory(FakeClock())
    directory.update({"a": report(state="draining"), "b": report()})

    assert directory.rank(ROUTED, ["a", "b"]) == ["b", "a"]
    assert directory.states() == {"a": "draining", "b": "ready"}


def test_a_request_that_cannot_be_judged_goes_somewhere() -> None:
    def fails(*args: Any, **kwargs: Any) -> Choice:
        raise ZeroDivisionError

    directory = Directory(FakeClock(), fails)
    directory.begin("r")
    directory.send("a", "r", ROUTED)

    assert directory.rank(ROUTED, ["a", "b"]) == ["b", "a"]


def test_who_is_gone_is_forgotten() -> None:
    directory = Directory(FakeClock())
    directory.update({"a": report(), "b": None})
    directory.begin("r")
    directory.send("b", "r", ROUTED)

    directory.lose("a")
    directory.end("x")
    assert directory.states() == {"b": "loading"}
    directory.update({})
    assert directory.reports() == {}
    directory.end("r")
    directory.check_invariants()


def test_reports_and_refusals_survive_the_way_between_processes() -> None:
    error = BudgetUnattainableError("No.", param="budget.ttft_ms", retry_after_s=3.0)

    sent = pickle.loads(pickle.dumps((report(), error)))

    assert sent[0] == report()
    assert type(sent[1]) is BudgetUnattainableError
    assert (sent[1].body(), sent[1].retry_after_s) == (error.body(), 3.0)


@pytest.mark.parametrize(
    ("current", "pressures", "missed", "wanted"),
    [
        pytest.param(2, [0.6, 0.6], [0.0, 0.0], 2, id="enough"),
        pytest.param(2, [0.9, 0.9], [0.0, 0.0], 3, id="full"),
        pytest.param(2, [2.0, 2.0], [0.0, 0.0], 6, id="far too much"),
        pytest.param(2, [0.6, 0.6], [0.2, 0.0], 3, id="budgets are missed"),
        pytest.param(2, [0.1, 0.1], [0.2, 0.2], 3, id="missed for another reason than pressure"),
        pytest.param(4, [0.3] * 4, [0.0] * 4, 3, id="too many"),
        pytest.param(3, [0.0] * 3, [0.0] * 3, 1, id="idle"),
        pytest.param(3, [], [], 3, id="nothing is known"),
        pytest.param(0, [], [], 1, id="none"),
        pytest.param(2, [0.45, 0.45], [0.0, 0.0], 2, id="fewer would be too full"),
    ],
)
def test_the_number_of_replicas_follows_pressure_and_missed_budgets(
    current: int, pressures: list[float], missed: list[float], wanted: int
) -> None:
    assert wanted_replicas(current, pressures, missed) == wanted


@pytest.mark.parametrize("pressure", [i / 20 for i in range(60)])
def test_the_number_of_replicas_does_not_swing(pressure: float) -> None:
    """What is wanted at a load is still wanted when it is there."""
    load, current = 4 * pressure, 4
    for _ in range(10):
        current = wanted_replicas(current, [load / current] * current, [0.0] * current)

    assert wanted_replicas(current, [load / current] * current, [0.0] * current) == current


def test_metrics_of_several_processes_are_one_text() -> None:
    one = '# HELP x_total X\n# TYPE x_total counter\nx_total{e="6"} 1.0\n'
    one += "# HELP y Y\n# TYPE y gauge\ny 2.0\n"

    text = merged(
        {"a": one, "b": one}, keeps=lambda process, family: (process, family) != ("b", "y")
    )

    assert text == (
        "# HELP x_total X\n# TYPE x_total counter\n"
        'x_total{replica="a",e="6"} 1.0\nx_total{replica="b",e="6"} 1.0\n'
        '# HELP y Y\n# TYPE y gauge\ny{replica="a"} 2.0\n'
    )


def test_a_report_that_is_no_news_changes_nothing() -> None:
    clock = FakeClock()
    directory = Directory(clock, by_what_was_sent)
    own = report()
    directory.update({"a": own, "b": own})
    directory.begin("r")
    directory.send("a", "r", ROUTED)
    clock.now += 5.0

    directory.update({"a": replace(own), "b": report(2.0)})

    assert directory.rank(ROUTED, ["a", "b"]) == ["b", "a"]
