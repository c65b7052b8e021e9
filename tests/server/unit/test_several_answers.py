"""Several answers of one request are judged as one; who is refused is told when to come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from sortserve.admission.choose import ExitChoice, choose_exit
from sortserve.admission.offered import Offered, OfferedLoad
from sortserve.core.errors import BudgetUnattainableError
from sortserve.scheduling.demand import Demand
from support.timed import COSTS, make_demand, make_timed, timed_request


def long_promises(exit_layer: int, gap_s: float) -> tuple[Demand, ...]:
    """Three that leave little room, and end one after the other."""
    return tuple(
        replace(
            make_demand(f"t{i}", exit_layer, due_s=0.01, gap_s=gap_s, floor_layer=2),
            num_left=300 * (1 + i),
        )
        for i in range(3)
    )


def test_several_that_come_together_start_where_all_of_them_fit() -> None:
    timed = make_timed()
    request = timed_request("r", max_tokens=20, latency_ms=200)
    alone = timed.desk.choose(request, (2, 4, 6)).exit_layer

    together = [timed.desk.choose(request, (2, 4, 6), num_sequences=n) for n in (1, 16, 64)]

    exits = [choice.exit_layer for choice in together]
    assert exits[0] == alone == 6
    assert exits == sorted(exits, reverse=True)
    assert exits[-1] < 6
    assert timed.desk.choose(request, (2, 4, 6), exit_layer=4).exit_layer == 4


def test_several_answers_bring_as_much_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they may cost the others more than one answer may."""
    asked: list[Mapping[int, float]] = []

    def choose(*args: Any, worth: Mapping[int, float], **others: Any) -> ExitChoice:
        asked.append(worth)
        return choose_exit(*args, worth=worth, **others)

    monkeypatch.setattr("sortserve.admission.desk.choose_exit", choose)
    request = timed_request("r", max_tokens=20, latency_ms=1e4)
    for num_sequences in (1, 8):
        make_timed().desk.choose(request, (2, 4, 6), num_sequences=num_sequences)

    one, several = asked
    assert several == {e: pytest.approx(8 * value) for e, value in one.items()}


@pytest.mark.parametrize(("latency_ms", "num_sequences"), [(240, 3), (235, 3)])
def test_what_several_cost_others_counts_against_what_all_of_them_bring(
    latency_ms: float, num_sequences: int
) -> None:
    """One by one they are let in as they were judged, though the last would pay for all."""
    timed = make_timed(scores=(0.3, 0.7, 1.0), min_quality=0.0)
    for i in range(2):
        timed.arrive(timed_request(f"before {i}", 20, max_tokens=40, latency_ms=1.5 * latency_ms))
    for _ in range(4):
        timed.step()
    timed.desk.see(timed.engine.demands())

    def choose(request_id: str, exit_layer: int | None, num_together: int) -> ExitChoice:
        request = timed_request(
            request_id, 20, max_tokens=40, at=timed.engine.clock(), latency_ms=latency_ms
        )
        choice = timed.desk.choose(
            request, (2, 4, 6), exit_layer=exit_layer, num_sequences=num_together
        )
        if exit_layer is not None:
            timed.desk.enter(request, choice)
        return choice

    start = choose("all", None, num_sequences)
    assert start.fits

    ids = [str(i) for i in range(num_sequences)]
    assert all(choose(i, start.exit_layer, num_sequences).fits for i in ids)
    assert not choose("one more alone", start.exit_layer, 1).fits


@pytest.mark.parametrize("num_sequences", [1, 2, 3])
def test_what_several_cost_later_requests_is_charged_to_all_of_them_at_once(
    num_sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And to none where there is nobody else: not to the second for the sake of the first."""
    many = OfferedLoad(share=0.5, worth=1000.0)
    monkeypatch.setattr(Offered, "load", lambda *_: many)
    timed = make_timed()
    latency_ms = 1e3 * 1.6 * 100 * COSTS.decode_s(6, 50)

    def choose(request_id: str, exit_layer: int | None) -> None:
        request = timed_request(
            request_id, 20, max_tokens=100, latency_ms=latency_ms, exit_layer=6, on_miss="reject"
        )
        choice = timed.desk.choose(
            request, (6,), exit_layer=exit_layer, num_sequences=num_sequences
        )
        if exit_layer is not None:
            timed.desk.enter(request, choice)

    choose("all", None)
    for i in range(num_sequences):
        choose(str(i), 6)

    with pytest.raises(BudgetUnattainableError, match="would cost other requests more"):
        choose("one more", None)


def test_all_of_several_count_as_work_that_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[float, float]] = []
    monkeypatch.setattr(Offered, "note", lambda _, __, *what: noted.append(what))
    request = timed_request("r", 200, max_tokens=20, latency_ms=1e4)

    for num_sequences in (1, 4):
        make_timed().desk.choose(request, (2, 4, 6), num_sequences=num_sequences)

    (work_s, worth), all_of_them = noted
    assert all_of_them == pytest.approx((4 * work_s, 4 * worth))


def test_several_that_come_at_once_come_back_when_there_is_room_for_all_of_them() -> None:
    timed = make_timed()
    timed.desk.see(long_promises(exit_layer=2, gap_s=0.0034))
    request = timed_request("r", 20, max_tokens=140, latency_ms=600, on_miss="reject")

    def retry_after_s(num_sequences: int) -> float:
        with pytest.raises(BudgetUnattainableError) as refusal:
            timed.desk.choose(request, (2, 4, 6), num_sequences=num_sequences)
        assert refusal.value.retry_after_s is not None
        return refusal.value.retry_after_s

    assert retry_after_s(64) > retry_after_s(1)


def test_who_expired_in_the_queue_is_told_what_a_refusal_would_say() -> None:
    """Others make no room for less than it brings, then as now."""
    timed = make_timed(scores=(0.0, 0.1, 1.0), min_quality=0.0)
    timed.desk.see(long_promises(exit_layer=6, gap_s=0.0072))
    request = replace(
        timed_request("r", 20, max_tokens=40, latency_ms=500, on_miss="reject"), weight=0.25
    )

    with pytest.raises(BudgetUnattainableError) as refusal:
        timed.desk.choose(request, (2, 4, 6))

    assert timed.desk.retry_after_s(request) == refusal.value.retry_after_s
