"""Who comes in beside a promise that is at risk: who can wait until it is over."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.admission.at_risk import AtRisk
from sortserve.scheduling.demand import Demand
from sortserve.scheduling.demand_table import DemandTable
from sortserve.scheduling.full_batch import course
from sortserve.scheduling.lowering import Times
from support.timed import COSTS, make_demand

EXITS = (2, 4, 6)
NOW = Times(now=0.0, busy_s=0.0)
DEEP_S = COSTS.decode_s(6, 10)
NUM_LEFT = 20
LOST = make_demand(
    "lost", 6, due_s=0.8 * DEEP_S, gap_s=0.8 * DEEP_S, num_left=NUM_LEFT, floor_layer=6
)
"""It wants its tokens faster than the machine makes them."""


def at_risk(*demands: Demand) -> AtRisk | None:
    table = DemandTable.of(demands, COSTS, EXITS)
    return AtRisk.of(table, course(table, table.level), NOW, NOW)


def newcomer(*, first_due_s: float, gap_s: float) -> Demand:
    return make_demand("new", 6, due_s=first_due_s, gap_s=gap_s, num_pending=100, num_left=10)


def lets_in(found: AtRisk | None, one: Demand) -> bool:
    assert found is not None
    return found.keeps_others_and(one, COSTS, NOW)


def test_nothing_is_at_risk_where_one_course_keeps_all() -> None:
    assert at_risk() is None
    assert at_risk(make_demand("a", 6, due_s=3 * DEEP_S), make_demand("b", 6)) is None


def test_who_has_the_time_waits_until_the_answer_at_risk_is_over() -> None:
    found = at_risk(LOST)
    assert found is not None
    assert found.num_steps == NUM_LEFT
    assert found.over_s == pytest.approx(NUM_LEFT * DEEP_S, rel=0.05)

    reading_s = COSTS.prefill_s(6, 100)
    soon, late = found.over_s + 0.5 * reading_s, found.over_s + 2 * reading_s + DEEP_S
    assert not lets_in(found, newcomer(first_due_s=soon, gap_s=3 * DEEP_S))
    assert lets_in(found, newcomer(first_due_s=late, gap_s=3 * DEEP_S))
    assert not lets_in(found, newcomer(first_due_s=late, gap_s=0.5 * DEEP_S))


def test_nobody_comes_in_who_would_break_what_is_not_at_risk() -> None:
    kept = make_demand("kept", 6, due_s=1.3 * DEEP_S, gap_s=1.3 * DEEP_S, num_left=2 * NUM_LEFT)
    easy = newcomer(first_due_s=100.0, gap_s=1.0)
    long = make_demand("long", 6, due_s=100.0, gap_s=1.0, num_pending=6000)

    assert lets_in(at_risk(LOST, kept), easy)
    assert not lets_in(at_risk(LOST, kept), long)


def test_those_who_wait_already_begin_later_as_well() -> None:
    """Two that would each be in time after the answer at risk, and not both."""
    reading_s, row_s = COSTS.prefill_s(6, 100), COSTS.row_s(6, 30)
    after_s = NUM_LEFT * DEEP_S + 2 * reading_s + 4 * DEEP_S

    def waiting(end_s: float) -> Demand:
        one = newcomer(first_due_s=after_s, gap_s=1.0)
        return replace(one, request_id="waiting", end_s=end_s)

    tight_s = after_s + 10 * (DEEP_S + row_s)
    assert lets_in(at_risk(LOST), waiting(tight_s))
    assert not lets_in(
        at_risk(LOST, waiting(NUM_LEFT * DEEP_S + 2 * reading_s + 8 * DEEP_S)),
        newcomer(first_due_s=100.0, gap_s=1.0),
    )


def test_a_prompt_at_risk_is_read_before() -> None:
    prompt = make_demand(
        "prompt", 6, due_s=1e-4, gap_s=1e-3, num_pending=500, num_left=2, floor_layer=6
    )
    found = at_risk(prompt)
    assert found is not None
    assert math.isinf(found.table.due_s[0])
    assert found.over_s >= COSTS.prefill_s(6, 500)
    reading_s = COSTS.prefill_s(6, 100) + 3 * DEEP_S

    assert lets_in(found, newcomer(first_due_s=found.over_s + reading_s, gap_s=1.0))
    assert not lets_in(found, newcomer(first_due_s=0.9 * found.over_s, gap_s=1.0))


@given(first_due_s=st.floats(1e-3, 1.0), gap_s=st.floats(1e-4, 0.1), more_s=st.floats(0.0, 1.0))
def test_who_has_more_time_is_never_kept_out_for_it(
    first_due_s: float, gap_s: float, more_s: float
) -> None:
    found = at_risk(LOST, make_demand("kept", 6, due_s=2 * DEEP_S, gap_s=2 * DEEP_S))

    if lets_in(found, newcomer(first_due_s=first_due_s, gap_s=gap_s)):
        assert lets_in(found, newcomer(first_due_s=first_due_s + more_s, gap_s=gap_s))
