"""What those who come later are expected to lose by a promise to one newcomer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.admission.offered import (
    LEAST,
    LOST_SHARE,
    MOST_SHARE,
    NOTHING_OFFERED,
    WINDOW,
    Offered,
    OfferedLoad,
)


def arrived(num: int, *, every_s: float = 1.0, work_s: float = 0.1, worth: float = 1.0) -> Offered:
    offered = Offered()
    for i in range(num):
        offered.note(i * every_s, work_s, worth)
        offered.check_invariants()
    return offered


def loss(load: OfferedLoad, *answers: tuple[float, float], now: float = 0.0) -> float:
    """Of answers that have so long until their ends, and can spare so much of it."""
    lasts, spares = np.array([*zip(*answers, strict=True)])
    return load.loss(now + lasts, spares, now)


def test_the_share_is_the_work_that_comes_a_second() -> None:
    load = arrived(20, every_s=0.5, work_s=0.1).load(19 * 0.5)

    assert load.share == pytest.approx(0.2)
    assert load.worth == pytest.approx(10.0), "ten prompts take a second to read"


def test_a_few_requests_say_nothing() -> None:
    assert arrived(LEAST - 1).load(10.0) is NOTHING_OFFERED
    assert arrived(LEAST).load(10.0) is not NOTHING_OFFERED


def test_only_the_latest_count() -> None:
    offered = arrived(WINDOW, work_s=5.0)
    for i in range(WINDOW):
        offered.note(WINDOW + i, 0.1, 1.0)

    assert offered.load(2.0 * WINDOW - 1).share == pytest.approx(0.1)


def test_where_nobody_comes_any_more_it_falls() -> None:
    offered = arrived(20)
    shares = [offered.load(at).share for at in (19.0, 40.0, 400.0)]

    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.01


def test_requests_without_a_time_take_room_and_lose_nothing_by_waiting() -> None:
    load = arrived(20, worth=0.0).load(19.0)

    assert load.share == pytest.approx(0.1)
    assert loss(load, (100.0, 0.0)) == 0.0


def test_prompts_that_take_no_time_lose_nothing() -> None:
    assert arrived(20, work_s=0.0).load(19.0) is NOTHING_OFFERED


def test_many_at_one_moment_are_no_division_by_zero() -> None:
    load = arrived(20, every_s=0.0).load(0.0)

    assert math.isfinite(load.share)
    assert loss(load, (10.0, 0.0)) == pytest.approx(LOST_SHARE * load.worth * 10.0 * MOST_SHARE)


def test_an_answer_that_can_spare_what_comes_costs_nobody_anything() -> None:
    load = OfferedLoad(share=0.2, worth=10.0)

    assert loss(load, (5.0, 1.0)) == 0.0
    assert loss(load, (5.0, 0.5)) == pytest.approx(LOST_SHARE * 10.0 * 0.5)


def test_the_answer_that_keeps_most_out_says_how_much() -> None:
    load = OfferedLoad(share=0.2, worth=10.0)

    both = loss(load, (5.0, 0.5), (10.0, 0.0))

    assert both == loss(load, (10.0, 0.0))


def test_who_was_promised_nothing_keeps_nobody_out() -> None:
    assert loss(OfferedLoad(0.5, 10.0), (math.inf, math.inf)) == 0.0


@given(
    share=st.floats(0.0, 3.0),
    answers=st.lists(
        st.tuples(st.floats(0.0, 60.0), st.floats(-5.0, 60.0)), min_size=1, max_size=6
    ),
    one=st.tuples(st.floats(0.0, 60.0), st.floats(-5.0, 60.0)),
)
def test_one_more_answer_never_costs_less(
    share: float, answers: list[tuple[float, float]], one: tuple[float, float]
) -> None:
    load = OfferedLoad(share, 7.0)

    assert 0.0 <= loss(load, *answers) <= loss(load, *answers, one)
