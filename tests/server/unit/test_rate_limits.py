"""Limits per minute: what a bucket lets through, when to come back, what is given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.core.rate_limits import (
    Bucket,
    corrected,
    duration_text,
    full,
    refilled,
    reset_s,
    resized,
    wait_s,
)


def test_a_minutes_worth_may_come_at_once_and_then_one_at_a_time() -> None:
    bucket = corrected(full(60, 100.0), 60, 60)

    assert wait_s(bucket, 60, 1) == pytest.approx(1.0)
    assert refilled(bucket, 60, 101.0).level == pytest.approx(1.0)
    assert wait_s(refilled(bucket, 60, 101.0), 60, 1) == 0.0


def test_it_is_full_after_a_minute_and_holds_no_more() -> None:
    empty = Bucket(0.0, 0.0)

    assert reset_s(empty, 90) == 60.0
    assert refilled(empty, 90, 60.0).level == refilled(empty, 90, 9999.0).level == 90.0


def test_more_than_a_minutes_worth_is_let_in_when_full_and_leaves_a_debt() -> None:
    bucket = full(60, 0.0)
    assert wait_s(bucket, 60, 600) == 0.0

    bucket = corrected(bucket, 60, 600)

    assert wait_s(bucket, 60, 1) == pytest.approx(541.0)
    assert reset_s(bucket, 60) == pytest.approx(600.0)


def test_what_was_charged_too_much_is_given_back_up_to_the_limit() -> None:
    bucket = corrected(full(100, 0.0), 100, 80)

    assert corrected(bucket, 100, -50).level == 70.0
    assert corrected(refilled(bucket, 100, 60.0), 100, -50).level == 100.0


def test_a_clock_that_goes_back_changes_nothing() -> None:
    bucket = Bucket(3.0, 50.0)

    assert refilled(bucket, 60, 40.0) == bucket


def test_another_limit_keeps_what_was_used() -> None:
    assert resized(Bucket(40.0, 0.0), 100, 200).level == 140.0
    assert resized(Bucket(40.0, 0.0), 100, 50).level == -10.0
    assert resized(Bucket(100.0, 0.0), 100, 50).level == 50.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0204, "20ms"),
        (8.64, "8.64s"),
        (0.9996, "1s"),
        (59.994, "59.99s"),
        (59.999, "1m0s"),
        (360, "6m0s"),
        (3723, "1h2m3s"),
    ],
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(
    limit=st.integers(1, 50),
    asks=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), max_size=60),
)
def test_no_stretch_of_time_sees_more_than_the_limit_and_its_refill(
    limit: int, asks: list[tuple[float, int]]
) -> None:
    """The bound that the module states, over every stretch between two requests."""
    now, bucket = 0.0, full(limit, 0.0)
    taken: list[tuple[float, float]] = []
    for gap_s, amount in asks:
        now += gap_s
        bucket = refilled(bucket, limit, now)
        waits_s = wait_s(bucket, limit, amount)
        if waits_s == 0.0:
            bucket = corrected(bucket, limit, amount)
            taken.append((now, amount))
        else:
            later = refilled(bucket, limit, now + waits_s + 1e-6)
            assert wait_s(later, limit, amount) == 0.0, "who comes back when told to is let in"
    for i, (start_s, _) in enumerate(taken):
        for end_s, last in taken[i:]:
            inside = sum(a for at_s, a in taken if start_s <= at_s <= end_s)
            overdraft = max(0, last - limit)
            assert inside - overdraft <= limit + limit * (end_s - start_s) / 60 + 1e-6
