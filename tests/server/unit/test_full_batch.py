"""What each answer can spare if every step runs everybody; against the same, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.scheduling.demand import Demand
from sortserve.scheduling.demand_table import DemandTable
from sortserve.scheduling.full_batch import course, least_spare_s, least_uniform_lowering
from support.examples import examples
from support.timed import COSTS, make_demand

EXITS = (2, 4, 6)
TOKENS = np.array([0.5, 0.8, 1.0])
DEEP_S = COSTS.decode_s(6, 10)


@st.composite
def live(draw: st.DrawFn) -> list[Demand]:
    return [draw(one(str(i))) for i in range(draw(st.integers(1, 7)))]


@st.composite
def one(draw: st.DrawFn, request_id: str) -> Demand:
    exit_layer = draw(st.sampled_from(EXITS))
    demand = make_demand(
        request_id,
        exit_layer,
        due_s=draw(st.none() | st.floats(0.005, 0.6)),
        gap_s=draw(st.floats(0.005, 0.05)),
        floor_layer=draw(st.sampled_from([e for e in EXITS if e <= exit_layer])),
        num_pending=draw(st.sampled_from([1, 1, 40, 200])),
        num_left=draw(st.integers(1, 40)),
    )
    return replace(demand, is_waiting=demand.num_pending > 1)


def table_of(demands: Sequence[Demand]) -> DemandTable:
    return DemandTable.of(demands, COSTS, EXITS)


def spare_of(table: DemandTable, now: float = 0.0) -> list[float]:
    return [*map(float, course(table, table.level).spare_s(table, now=now))]


def played(demands: Sequence[Demand], now: float) -> dict[str, float]:
    """When each of those that count is over: steps of all who are left, longer by the prompts."""
    counted = [d for d in demands if d.is_decoding or d.is_hard]
    reads = [d for d in counted if not d.is_decoding]
    now += sum(d.work_s(COSTS) - COSTS.base_s(d.exit_layer) for d in reads)
    left = {d.request_id: d.num_left for d in counted}
    over = {d.request_id: now for d in counted}
    by_id, made = {d.request_id: d for d in counted}, 0
    while any(left.values()):
        runs = [by_id[i] for i, n in left.items() if n]
        now += COSTS.base_s(max(d.exit_layer for d in runs))
        now += sum(COSTS.row_s(d.exit_layer, d.context_len + d.num_pending + made) for d in runs)
        made += 1
        for demand in runs:
            left[demand.request_id] -= 1
            over[demand.request_id] = now
    return over


@given(demands=live(), now=st.floats(0.0, 0.2))
@settings(max_examples=examples(150), deadline=None)
def test_it_is_over_when_it_would_be_step_by_step(demands: list[Demand], now: float) -> None:
    table = table_of(demands)

    spare = spare_of(table, now)

    over = played(demands, now)
    expected = [d.end_s - over.get(d.request_id, -math.inf) for d in demands]
    assert spare == pytest.approx(expected)


def test_contexts_grow_with_each_step() -> None:
    long = make_demand("long", 6, due_s=2 * DEEP_S, num_left=1000)
    table = table_of([long])

    over_s = course(table, table.level).over_s[0]

    assert over_s == pytest.approx(sum(COSTS.decode_s(6, 11 + i) for i in range(1000)))


@given(demands=live(), more=one("more"))
@settings(max_examples=examples(100), deadline=None)
def test_one_more_never_leaves_anybody_more_to_spare(demands: list[Demand], more: Demand) -> None:
    before, after = table_of(demands), table_of([*demands, more])

    pairs = zip(spare_of(after)[:-1], spare_of(before), strict=True)

    assert all(then <= now + 1e-9 for then, now in pairs)


@given(demands=live())
@settings(max_examples=examples(100), deadline=None)
def test_the_least_lowering_is_enough_and_no_deeper_one_is(demands: list[Demand]) -> None:
    table = table_of(demands)

    found = least_uniform_lowering(table, TOKENS, limit=math.inf, now=0.0)

    options = [np.minimum(table.level, np.maximum(table.floor, k)) for k in (2, 1, 0)]
    enough = [to for to in options if course(table, to).keeps_all(table, now=0.0)]
    assert (found is None) == (not enough)
    if found is not None:
        levels, loss = found
        assert levels.tolist() == enough[0].tolist()
        share = table.weight * table.left_share
        assert loss == pytest.approx(share @ (TOKENS[table.level] - TOKENS[levels]))


def test_no_lowering_loses_more_than_the_limit() -> None:
    table = table_of([make_demand("r", 6, due_s=0.8 * DEEP_S)])
    found = least_uniform_lowering(table, TOKENS, limit=1.0, now=0.0)

    assert found is not None
    assert found[1] == pytest.approx(0.2)
    assert least_uniform_lowering(table, TOKENS, limit=0.1, now=0.0) is None


def test_an_answer_that_may_end_with_its_next_token_spares_what_it_has_saved() -> None:
    row = make_demand("r", 6, due_s=2 * DEEP_S, num_left=100)
    may_end = replace(row, next_by_s=1.5 * DEEP_S)
    prompt = make_demand("prompt", 6, due_s=9.0, num_pending=200)

    spare_s, of_may_end = (least_spare_s([d], EXITS, COSTS, 0.0) for d in (row, may_end))

    assert spare_s > 50 * DEEP_S
    assert of_may_end == pytest.approx(0.5 * DEEP_S, rel=0.01)
    for one, keeps in ((row, True), (may_end, False)):
        table = table_of([one, prompt])
        assert course(table, table.level).keeps_all(table, now=0.0) is keeps


def test_who_was_promised_nothing_rides_along_and_has_no_end() -> None:
    kept = make_demand("kept", 6, due_s=2 * DEEP_S)
    alone = table_of([kept])
    beside = table_of([kept, make_demand("soft", 6), make_demand("soft prompt", num_pending=900)])

    kept_s, *others = spare_of(beside)

    rides = sum(COSTS.row_s(6, 11 + i) for i in range(20))
    assert kept_s == pytest.approx(spare_of(alone)[0] - rides)
    assert others == [math.inf, math.inf], "its prompt is read in what is left over"


def test_a_prompt_has_to_be_read_by_its_due_time() -> None:
    late = make_demand("late", 6, due_s=1e-4, gap_s=1.0, num_pending=200)
    table = table_of([late])

    assert min(spare_of(table)) > 0.0, "its answer would be in time"
    assert not course(table, table.level).keeps_all(table, now=0.0)


def test_a_prompt_that_is_late_keeps_nobody_out_who_is_read_after_it() -> None:
    late = make_demand("late", 6, due_s=1e-4, gap_s=1.0, num_pending=200)
    newcomer = make_demand("newcomer", 6, due_s=5.0, gap_s=1.0, num_pending=200)
    table = table_of([late, newcomer])

    found = course(table, table.level)

    assert found.keeps_all(table, now=0.0, from_due_s=newcomer.due_s)
    assert not found.keeps_all(table, now=0.0, from_due_s=late.due_s)


def test_the_least_spare_time_is_that_of_those_who_decode() -> None:
    tight = make_demand("tight", 6, due_s=2 * DEEP_S, num_left=1)
    prompt = make_demand("prompt", 6, due_s=0.1 * DEEP_S, num_pending=500)

    assert least_spare_s([tight, prompt], EXITS, COSTS, 0.0) == pytest.approx(DEEP_S, rel=0.01)
    assert least_spare_s([prompt], EXITS, COSTS, 0.0) == math.inf
