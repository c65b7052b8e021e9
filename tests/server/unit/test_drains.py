"""When to come back is worked out once for a crowd, and again when time has passed."""

from __future__ import annotations

from dataclasses import replace

from sortserve.admission.drain import KEEP_S, MAX_TOLD, Drains
from sortserve.admission.outlook import Newcomer
from sortserve.admission.seen import Seen
from sortserve.core.budget import Budget
from sortserve.scheduling.columns import Columns
from support.timed import make_demand


def newcomer(num_prompt: int = 100, latency_ms: float = 1000.0, at: float = 0.0) -> Newcomer:
    return Newcomer(
        num_prompt_tokens=num_prompt,
        num_output_tokens=50,
        arrival_s=at,
        deadlines=Budget(latency_ms=latency_ms).deadlines(at),
    )


class Counted:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> float | None:
        self.count += 1
        return float(self.count)


def test_a_crowd_of_one_kind_is_told_the_same_for_a_moment() -> None:
    drains, predict = Drains(), Counted()

    told = [
        drains.ask(2, newcomer(100 + i, 1000.0 - i, at=now), now, predict)
        for i, now in enumerate([0.0, 0.1, KEEP_S - 1e-6])
    ]

    assert told == [1.0, 1.0, 1.0]
    assert drains.ask(2, newcomer(at=KEEP_S), KEEP_S, predict) == 2.0


def test_who_needs_much_more_has_much_less_time_or_weighs_much_less_is_not_told_the_same() -> None:
    drains, predict = Drains(), Counted()

    told = [
        drains.ask(exit_layer, asking, 0.0, predict)
        for exit_layer, asking in (
            (2, newcomer()),
            (4, newcomer()),
            (2, newcomer(1000)),
            (2, newcomer(latency_ms=90.0)),
            (2, replace(newcomer(), weight=0.25)),
            (2, replace(newcomer(), num_siblings=7)),
        )
    ]

    assert told == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_what_was_told_takes_no_memory_without_end() -> None:
    drains, predict = Drains(), Counted()

    for i in range(5 * MAX_TOLD):
        drains.ask(i, newcomer(), 0.0, predict)

    assert len(drains._told) <= MAX_TOLD


def test_the_columns_are_those_of_the_requests_seen_and_of_those_on_their_way() -> None:
    seen = Seen()
    first, second = make_demand("a", 4, due_s=1.0), make_demand("b", 6, num_pending=30)

    assert seen.all()[0] == ()
    seen.show((first,))
    seen.enter(second)
    demands, columns, *_ = seen.all()

    assert demands == (first, second)
    for name, column in vars(Columns.of(demands)).items():
        assert list(getattr(columns, name)) == list(column)
    seen.show((first, second), taken=["b"])
    assert seen.all()[0] == (first, second)
