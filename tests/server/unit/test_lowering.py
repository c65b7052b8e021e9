"""Who goes shallower, and what it costs: least loss of worth for the promises that are kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sortserve.scheduling.capacity import pressure
from sortserve.scheduling.demand import NO_GAP_S, Demand, StepCosts
from sortserve.scheduling.demand_table import LEAST_TIME_S, DemandTable
from sortserve.scheduling.lowering import Times, least_lowering, lower
from sortserve.scheduling.objective import OBJECTIVES, Worth, share_of_layers
from support.scripted import make_exits
from support.timed import COSTS, make_demand

EXITS = (2, 4, 6)
SHARES = share_of_layers(EXITS)
DEEP_S = COSTS.decode_s(6, 10)


def worth(*tokens: float) -> Worth:
    """Of exits 2, 4 and 6; an answer is worth its best tokens."""
    return Worth(dict(zip(EXITS, tokens, strict=True)), dict.fromkeys(EXITS, tokens[-1]))


def flight(*demands: Demand, of: Worth = SHARES) -> dict[str, int]:
    return dict(lower(demands, EXITS, COSTS, 0.0, of))


def loss_of_room(demands: Sequence[Demand], of: Worth, limit: float = math.inf) -> float | None:
    table = DemandTable.of(demands, COSTS, EXITS)
    tokens = np.array([of.tokens[e] for e in EXITS])
    return least_lowering(table, tokens, Times(now=0.0), limit=limit)


# ---- demands as columns ----


def pressure_by_hand(demands: Sequence[Demand], costs: StepCosts, now: float) -> float:
    """The formulas of ``capacity``, one demand after the other."""
    rates: dict[int, float] = {}
    rows, worst, work_s = 0.0, 0.0, 0.0

    def share() -> float:
        total, deeper = rows, 0.0
        for exit_layer in sorted(rates, reverse=True):
            rate = max(rates[exit_layer], deeper)
            total += (rate - deeper) * costs.base_s(exit_layer)
            deeper = rate
        return total

    def decodes(d: Demand) -> None:
        nonlocal rows
        rate = 1.0 / max(d.gap_s, NO_GAP_S)
        rates[d.exit_layer] = max(rates.get(d.exit_layer, 0.0), rate)
        rows += rate * costs.row_s(d.exit_layer, d.context_len + d.num_pending)

    for d in demands:
        if d.is_decoding or (d.is_promised and not d.is_hard):
            decodes(d)
    prompts = (d for d in demands if d.is_hard and not d.is_decoding)
    for d in sorted(prompts, key=lambda d: d.due_s):
        work_s += d.work_s(costs)
        worst = max(worst, share() + work_s / max(d.due_s - now, LEAST_TIME_S))
        decodes(d)
    return max(worst, share())


@st.composite
def live_requests(draw: st.DrawFn, *, most: int = 7) -> list[Demand]:
    demands = []
    for i in range(draw(st.integers(1, most))):
        exit_layer = draw(st.sampled_from(EXITS))
        demands.append(
            replace(
                make_demand(
                    str(i),
                    exit_layer,
                    due_s=draw(st.none() | st.floats(0.001, 1.0)),
                    gap_s=draw(st.floats(0.003, 0.1)),
                    floor_layer=draw(st.sampled_from([e for e in EXITS if e <= exit_layer])),
                    num_pending=draw(st.sampled_from([1, 1, 1, 40, 1500])),
                    context_len=draw(st.sampled_from([10, 5000])),
                ),
                weight=draw(st.sampled_from([0.25, 1.0, 4.0])),
                num_left=draw(st.integers(1, 50)),
                num_done=draw(st.integers(0, 50)),
            )
        )
    return demands


@given(demands=live_requests(most=12))
@settings(max_examples=100, deadline=None)
def test_the_columns_say_what_the_formulas_say(demands: list[Demand]) -> None:
    expected = pressure_by_hand(demands, COSTS, 0.0)

    assert pressure(demands, COSTS, now=0.0) == pytest.approx(expected)

    first, *rest = demands
    joined = DemandTable.of(rest, COSTS, EXITS).plus(DemandTable.of([first], COSTS, EXITS))
    assert joined.need(joined.level, now=0.0).share == pytest.approx(
        pressure_by_hand([*rest, first], COSTS, 0.0)
    )
    gone = joined.without(np.array([len(rest)]))
    assert gone.need(gone.level, now=0.0).share == pytest.approx(
        pressure_by_hand(rest, COSTS, 0.0) if rest else 0.0
    )


# ---- room for a newcomer ----


def best_loss(demands: Sequence[Demand], of: Worth) -> float | None:
    """Of all lowerings there are; None if none is enough."""
    ways = [[e for e in EXITS if d.floor_layer <= e <= d.exit_layer] for d in demands]
    losses = []
    for exits in itertools.product(*ways):
        moved = [replace(d, exit_layer=e) for d, e in zip(demands, exits, strict=True)]
        if pressure(moved, COSTS, now=0.0) <= 1.0:
            losses.append(
                sum(
                    d.weight
                    * (d.num_left / (d.num_left + d.num_done))
                    * (of.tokens[d.exit_layer] - of.tokens[e])
                    for d, e in zip(demands, exits, strict=True)
                )
            )
    return min(losses, default=None)


TABLES = st.tuples(*[st.floats(0.0, 1.0)] * 3).map(lambda t: worth(*sorted(t)))


@given(demands=live_requests(most=5), of=TABLES)
@settings(max_examples=150, deadline=None)
def test_room_is_found_where_there_is_any_and_never_for_less_than_it_costs(
    demands: list[Demand], of: Worth
) -> None:
    found, best = loss_of_room(demands, of), best_loss(demands, of)

    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found >= best - 1e-9


@given(demands=live_requests(), of=TABLES, limit=st.floats(0.0, 2.0))
@settings(max_examples=150, deadline=None)
def test_no_lowering_loses_more_than_the_limit(
    demands: list[Demand], of: Worth, limit: float
) -> None:
    found = loss_of_room(demands, of, limit)

    assert found is None or found <= limit


@given(demands=live_requests(), of=TABLES, factor=st.sampled_from([0.25, 3.0]))
@settings(max_examples=60, deadline=None)
def test_losses_are_in_proportion_to_the_weights(
    demands: list[Demand], of: Worth, factor: float
) -> None:
    heavier = [replace(d, weight=factor * d.weight) for d in demands]

    found, scaled = loss_of_room(demands, of), loss_of_room(heavier, of)

    assert (found is None) == (scaled is None)
    if found is not None:
        assert scaled == pytest.approx(factor * found)


def test_a_group_is_moved_where_only_its_last_row_frees_the_depth() -> None:
    rows = [make_demand(str(i), 6, due_s=1.02 * DEEP_S) for i in range(6)]

    moved = flight(*rows)

    assert moved == {str(i): 4 for i in range(6)}


def test_the_one_that_has_least_left_goes_first() -> None:
    early, late = (
        replace(
            make_demand(name, 6, due_s=0.017, context_len=90_000),
            num_left=left,
            num_done=50,
        )
        for name, left in (("early", 100), ("late", 3))
    )

    assert flight(early, late) == {"late": 4}


# ---- in flight ----


def test_nobody_goes_shallower_without_need() -> None:
    assert flight(make_demand(due_s=0.1)) == {}


def test_nobody_goes_shallower_where_a_full_batch_keeps_all_not_even_at_no_loss() -> None:
    tie = OBJECTIVES["quality"].worth(make_exits(*EXITS, scores=(0.5, 1.0, 1.0)))
    decoding = make_demand("decoding", 6, due_s=1.12 * DEEP_S, num_left=40)
    prompt = make_demand("prompt", 6, due_s=0.25, num_pending=60, num_left=5)
    rows = [decoding, *(replace(prompt, request_id=str(i), is_waiting=True) for i in range(8))]
    assert pressure(rows, COSTS, now=0.0) > 1.0

    assert flight(*rows, of=tie) == {}


def test_the_promise_that_asks_most_goes_as_shallow_as_it_must_and_no_more() -> None:
    loose = make_demand("loose", 6, due_s=20 * DEEP_S)
    tight = make_demand("tight", 6, due_s=0.9 * DEEP_S)

    assert flight(loose, tight) == {"tight": 4}


def test_nobody_goes_below_the_floor_even_where_that_breaks_the_promise() -> None:
    fixed = make_demand("fixed", 6, floor_layer=6, due_s=0.1 * DEEP_S)
    tight = make_demand("tight", 6, floor_layer=4, due_s=0.9 * DEEP_S)

    assert flight(fixed) == {}
    assert flight(fixed, tight) in ({}, {"tight": 4})
    assert flight(tight) == {"tight": 4}


def test_what_cannot_be_kept_is_not_paid_for_by_others() -> None:
    hopeless = make_demand("hopeless", 6, floor_layer=6, due_s=0.2 * DEEP_S)
    others = [make_demand(str(i), 6, due_s=20 * DEEP_S) for i in range(3)]

    assert flight(hopeless, *others) == {}


def test_a_request_whose_budget_is_missed_in_any_case_goes_first() -> None:
    lost = replace(make_demand("lost", 6, gap_s=1.5 * DEEP_S), is_lost=True)
    kept = make_demand("kept", 6, due_s=1.5 * COSTS.decode_s(6, 10))
    also = make_demand("also", 6, due_s=1.01 * COSTS.decode_s(6, 10), floor_layer=6)

    moved = flight(lost, kept, also)

    assert moved == {} or "lost" in moved


def test_a_prompt_that_is_late_does_not_send_everybody_down() -> None:
    late = make_demand("late", 6, due_s=-0.5, num_pending=50, floor_layer=6)
    others = [make_demand(str(i), 6, due_s=4 * DEEP_S) for i in range(4)]

    assert flight(late, *others) == {}


# ---- objectives ----


def crowd() -> list[Demand]:
    return [make_demand(str(i), 6, due_s=1.02 * DEEP_S) for i in range(6)]


def test_for_attainment_everybody_is_lowered_before_one_promise_breaks() -> None:
    of = OBJECTIVES["attainment"].worth(make_exits(*EXITS, scores=(0.0, 0.1, 1.0)))

    assert len(flight(*crowd(), of=of)) > 0
    loss = loss_of_room(crowd(), of)
    assert loss is not None
    assert loss < 1e-3


def test_for_quality_it_is_the_checkpoint_that_says() -> None:
    tie = OBJECTIVES["quality"].worth(make_exits(*EXITS, scores=(0.5, 1.0, 1.0)))
    babble = OBJECTIVES["quality"].worth(make_exits(*EXITS, scores=(0.0, 0.05, 1.0)))

    assert loss_of_room(crowd(), tie) == 0.0
    loss = loss_of_room(crowd(), babble)
    assert loss is not None
    assert loss > 1.0, "more than the answer of a newcomer"
    assert set(flight(*crowd(), of=tie).values()) == {4}
    assert flight(*crowd(), of=babble) == {}, "one promise is worth less than six answers"


@example(scores=(0.9, 0.1))
@given(scores=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)))
def test_nobody_is_worth_more_at_a_shallower_exit(scores: tuple[float, float]) -> None:
    exits = make_exits(*EXITS, scores=(*scores, 1.0))

    for objective in OBJECTIVES.values():
        tokens = objective.worth(exits).tokens
        assert tokens[2] <= tokens[4] <= tokens[6]


def test_without_measured_quality_the_share_of_layers_counts() -> None:
    of = OBJECTIVES["quality"].worth(make_exits(*EXITS))

    assert of.tokens == pytest.approx({2: 1 / 3, 4: 2 / 3, 6: 1.0})
