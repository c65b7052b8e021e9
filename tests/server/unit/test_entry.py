"""When a request could enter: slots, pages, and who goes before."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sortserve.admission.drain import predicted_drain_s, predicted_places_s
from sortserve.admission.forecast import Forecast
from sortserve.admission.forecast import forecast as forecast_from
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.admission.play import Stay, foresee
from sortserve.admission.queue_limits import QueueLimits
from sortserve.admission.room import UNLIMITED, Room
from sortserve.core.budget import Budget
from sortserve.core.errors import BudgetUnattainableError, OverloadedError
from sortserve.core.slabs import Slabs
from sortserve.scheduling.policies.table import POLICIES, get_policy
from support.timed import MODEL, Timed, make_demand, make_timed, timed_request


def room(num_slots: int = 100, num_pages: int = 1000, num_free_pages: int | None = None) -> Room:
    return Room(
        num_slots=num_slots,
        num_pages=num_pages,
        num_free_pages=num_pages if num_free_pages is None else num_free_pages,
        block_size=4,
        slabs=Slabs(2),
    )


def stay(
    request_id: str,
    lasts_s: float,
    *,
    work_s: float = 0.0,
    pages: int = 1,
    last_pages: int | None = None,
    block_pages: int = 0,
    is_promised: bool = False,
) -> Stay:
    last = pages if last_pages is None else last_pages
    return Stay(request_id, pages, last, block_pages, work_s, lasts_s, is_promised)


# ---- the play ----


def test_where_there_is_room_everybody_starts_at_once_one_prompt_after_the_other() -> None:
    found = foresee([], [stay("a", 1.0, work_s=0.5), stay("b", 1.0, work_s=0.25)], [], room())

    assert found.start_s == {"a": 0.0, "b": 0.5}
    assert found.over_s == {"a": 1.75, "b": 1.75}
    assert found.crowded_s == math.inf


def test_with_all_slots_taken_each_waits_for_the_next_one_that_ends() -> None:
    running = [stay("slow", 5.0), stay("quick", 2.0)]

    found = foresee(running, [stay("a", 10.0), stay("b", 1.0)], [], room(num_slots=2))

    assert found.start_s == {"a": 2.0, "b": 5.0}
    assert found.over_s == {"quick": 2.0, "slow": 5.0, "b": 6.0, "a": 12.0}


def test_a_prompt_that_is_read_holds_up_all_others() -> None:
    running = [stay("runs", 2.0), stay("reads", 3.0, work_s=1.0)]

    found = foresee(running, [stay("next", 1.0, work_s=4.0)], [], room(num_slots=2))

    assert found.start_s == {"next": 3.0}
    assert found.over_s["reads"] == 3.0 + 1.0 + 4.0


def test_pages_are_waited_for_as_well_and_nobody_overtakes() -> None:
    running = [stay("large", 4.0, pages=900), stay("small", 1.0, pages=90)]

    found = foresee(
        running, [stay("wide", 1.0, pages=500), stay("narrow", 1.0)], [], room(num_free_pages=10)
    )

    assert found.start_s == {"wide": 4.0, "narrow": 4.0}


def test_a_request_takes_more_pages_with_every_token_and_keeps_a_block_to_spare() -> None:
    growing = stay("grows", 10.0, pages=100, last_pages=900, block_pages=1)
    running = [growing, stay("other", 5.0, block_pages=1)]

    def start_s(pages: int) -> float:
        asked = stay("new", 1.0, pages=pages)
        return foresee(running, [asked], [], room(num_free_pages=899)).start_s["new"]

    assert start_s(890) == 0.0
    assert start_s(898) == 10.0  # two blocks are spare, and half of the growth is over by 5 s


def test_pages_that_several_share_are_held_once() -> None:
    running = [stay("a", 1.0, pages=600), stay("b", 2.0, pages=600)]

    found = foresee(running, [stay("new", 1.0, pages=300)], [], room(num_free_pages=300))

    assert found.start_s == {"new": 0.0}


def test_of_those_who_go_last_one_a_second_goes_first() -> None:
    first = [stay(f"p{i}", 0.4) for i in range(6)]
    last = [stay(f"s{i}", 0.4) for i in range(2)]

    found = foresee([], first, last, room(num_slots=1))

    order = sorted(found.start_s, key=found.start_s.__getitem__)
    assert order == ["s0", "p0", "p1", "s1", "p2", "p3", "p4", "p5"]


def test_promises_that_outgrow_the_pages_are_seen() -> None:
    def crowded_s(*, is_promised: bool) -> float:
        stays = [
            stay(name, 10.0, pages=100, last_pages=600, is_promised=is_promised) for name in "ab"
        ]
        return foresee(stays, [], [], room()).crowded_s

    assert crowded_s(is_promised=True) == 10.0
    assert crowded_s(is_promised=False) == math.inf


def test_a_room_is_ample_if_all_could_run_to_their_ends() -> None:
    assert room(num_slots=8).is_ample(8, 300, 6)
    assert not room(num_slots=8).is_ample(9, 300, 6)
    assert not room().is_ample(8, 2000, 6)
    assert UNLIMITED.is_ample(10**6, 10**9, 100)


# ---- in a forecast ----


def forecast(exit_layer: int, asked: Newcomer, at: Load) -> Forecast:
    return forecast_from(exit_layer, asked, Outlook(at, MODEL, (exit_layer,)))


def newcomer(**budget: float) -> Newcomer:
    return Newcomer(
        num_prompt_tokens=100,
        num_output_tokens=50,
        arrival_s=0.0,
        deadlines=Budget.from_mapping(budget).deadlines(0.0),
        floor_layer=2,
    )


def hog(num_left: int = 500) -> Any:
    """Decodes for half a second for each 65 tokens or so."""
    return dataclasses.replace(make_demand("hog", 6, floor_layer=6), num_left=num_left)


def load(*demands: Any, policy: str = "deadline", num_slots: int = 1) -> Load:
    return Load(now=0.0, demands=demands, policy=get_policy(policy), room=room(num_slots=num_slots))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_first_token_comes_after_those_who_hold_the_slots(policy: str) -> None:
    alone = forecast(6, newcomer(), load(policy=policy)).estimate
    behind = forecast(6, newcomer(), load(hog(), policy=policy)).estimate

    assert 500 * 0.007 < behind.ttft_s - alone.ttft_s < 500 * 0.010


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("bound", ["ttft_ms", "latency_ms"])
def test_a_budget_that_ends_before_a_slot_is_free_cannot_be_kept(policy: str, bound: str) -> None:
    def keeps(limit: float, num_slots: int) -> bool:
        asked = newcomer(**{bound: limit})
        return forecast(6, asked, load(hog(), policy=policy, num_slots=num_slots)).loss is not None

    assert not keeps(3500, num_slots=1)
    assert keeps(3500, num_slots=2)
    assert keeps(6000, num_slots=1)


def test_a_time_per_token_does_not_depend_on_when_it_begins() -> None:
    assert forecast(6, newcomer(tpot_ms=20), load(hog())).loss == 0.0


def test_what_is_over_by_then_does_not_count_against_the_promise() -> None:
    """One that can be kept, just, with nobody beside it."""
    tight = dataclasses.replace(
        make_demand("tight", 6, due_s=0.01, gap_s=0.0078, floor_layer=6), num_left=100
    )

    def keeps(num_slots: int) -> bool:
        asked = newcomer(latency_ms=3000)
        return forecast(6, asked, load(tight, num_slots=num_slots)).loss is not None

    assert not keeps(num_slots=2)
    assert keeps(num_slots=1)


def test_nobody_is_let_in_who_takes_the_slot_that_another_was_promised() -> None:
    waiting = dataclasses.replace(
        make_demand("waits", 6, due_s=4.3, gap_s=0.5, num_pending=10, floor_layer=6),
        is_waiting=True,
        num_left=2,
    )
    sooner = newcomer(ttft_ms=4250)

    assert forecast(6, sooner, load(hog())).loss == 0.0
    assert forecast(6, sooner, load(hog(), waiting)).loss is None


# ---- when to come back ----


def test_a_refusal_for_want_of_a_slot_says_when_there_is_one() -> None:
    asked = newcomer(ttft_ms=500)

    drain_s = predicted_drain_s(6, asked, load(hog()), MODEL)

    assert drain_s is not None
    assert 500 * 0.007 < drain_s < 500 * 0.010
    assert predicted_drain_s(6, asked, load(), MODEL) == 0.0
    assert predicted_drain_s(6, newcomer(ttft_ms=1), load(hog()), MODEL) is None


def test_a_full_queue_says_when_enough_of_it_has_left() -> None:
    waiting = [
        dataclasses.replace(make_demand(f"w{i}", 6, num_pending=100), is_waiting=True, num_left=100)
        for i in range(3)
    ]
    behind = load(hog(100), *waiting)

    first, second, all_tokens = (
        predicted_places_s(1, 10, behind, MODEL),
        predicted_places_s(2, 10, behind, MODEL),
        predicted_places_s(1, 300, behind, MODEL),
    )

    assert 0.7 < first < 1.2
    assert 1.5 < second < 2.4
    assert all_tokens > second
    assert predicted_places_s(1, 1, load(), MODEL) == 0.0


def test_the_queue_asks_how_long_until_what_it_lacks_is_free() -> None:
    limits, asked = QueueLimits(max_requests=3, max_tokens=100), []
    limits.reserve(3, 90, retry_after_s=lambda *over: 0.0)

    def retry_after_s(num_requests: int, num_tokens: int) -> float:
        asked.append((num_requests, num_tokens))
        return 7.5

    with pytest.raises(OverloadedError) as refusal:
        limits.reserve(2, 30, retry_after_s=retry_after_s)

    assert asked == [(2, 20)]
    assert refusal.value.retry_after_s == 7.5


# ---- through the whole engine ----


def one_slot(policy: str = "deadline") -> Timed:
    timed = make_timed(max_num_seqs=1, policy=policy, max_model_len=1000)
    timed.arrive(timed_request("hog", max_tokens=700, exit_layer=6))
    for _ in range(10):
        timed.step()
    return timed


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_one_slot_that_is_taken_for_five_seconds(policy: str) -> None:
    """What was seen: accepted for 4,000 ms, refused after 4.1 s, 191 ms predicted."""
    timed = one_slot(policy)
    at = timed.clock.now
    late = timed_request("late", 100, latency_ms=4000, on_miss="reject", at=at)
    plain = timed_request("plain", 100, at=at)

    timed.arrive(late)
    timed.arrive(plain)
    timed.run()

    refusal = timed.refusals["late"]
    assert isinstance(refusal, BudgetUnattainableError)
    assert "needs 5" in refusal.message or "needs 6" in refusal.message
    report = timed.reports["plain"]
    assert report.predicted is not None
    assert report.ttft_s == pytest.approx(report.predicted.ttft_s, rel=0.15)


def test_who_comes_back_when_told_is_let_in() -> None:
    timed = one_slot()
    at = timed.clock.now
    timed.arrive(timed_request("late", 100, ttft_ms=300, on_miss="reject", at=at))
    retry_after_s = timed.refusals["late"].retry_after_s
    assert retry_after_s is not None
    assert 3.0 < retry_after_s < 5.5

    timed.run([timed_request("again", 100, ttft_ms=300, on_miss="reject", at=at + retry_after_s)])

    assert timed.reports["again"].met


def test_where_there_is_room_for_all_the_queue_is_not_played_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [make_demand(str(i), 6, due_s=100.0, gap_s=5.0) for i in range(256)]
    ample = Room(
        num_slots=1024, num_pages=10**6, num_free_pages=10**6, block_size=16, slabs=Slabs(2)
    )
    monkeypatch.setattr("sortserve.admission.entry.foresee", lambda *args: 1 / 0)

    at = Load(now=0.0, demands=rows, policy=get_policy("deadline"), room=ample)

    assert forecast(6, newcomer(latency_ms=60_000), at).estimate.ttft_s > 0.0
