"""Whatever a checkpoint's quality table says: no plan loses more than the refusal that it avoids.

The tables, the loads and the newcomers are drawn at random. What a decision brings is the worth of
the newcomer's answer at its exit, less what others lose by going shallower for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sortserve.admission.choose import choose_exit, worths
from sortserve.admission.forecast import Forecast, forecast
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.admission.plans import scheduled_plans
from sortserve.core.budget import Budget, OnMiss
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.schedule import DepthSchedule
from sortserve.scheduling.demand import Demand
from sortserve.scheduling.objective import OBJECTIVES, Worth
from sortserve.scheduling.policies.table import get_policy
from support.examples import examples
from support.scripted import make_exits
from support.timed import MODEL, make_demand, timed_request

EXITS = (2, 4, 6)
MEASURED = st.dictionaries(
    st.sampled_from(["0:6,10:4", "0:6,20:2", "0:6,5:4,15:2", "0:4,12:2"]), st.floats(0.0, 1.0)
)
"""Scores of depth schedules; there may be none."""
TABLES = st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)).map(lambda t: (*sorted(t), 1.0))


@st.composite
def rows(draw: st.DrawFn) -> list[Demand]:
    """Live requests, most of them paced so that there is little room left; some are not read yet.

    Some have gone shallower already.
    """
    return [draw(row(str(i))) for i in range(draw(st.integers(0, 6)))]


@st.composite
def row(draw: st.DrawFn, request_id: str) -> Demand:
    exit_layer = draw(st.sampled_from(EXITS))
    num_pending = draw(st.sampled_from([1, 1, 1, 40, 200]))
    demand = make_demand(
        request_id,
        exit_layer,
        due_s=draw(st.floats(0.03, 0.4)),
        gap_s=draw(st.floats(0.008, 0.05)),
        floor_layer=draw(st.sampled_from([e for e in EXITS if e <= exit_layer])),
        num_pending=num_pending,
    )
    return replace(
        demand,
        is_waiting=num_pending > 1,
        weight=draw(st.sampled_from([0.25, 1.0, 4.0])),
        num_left=draw(st.integers(1, 60)),
        num_done=draw(st.integers(0, 60)) if num_pending == 1 else 0,
    )


def worth_of_rest(demands: Sequence[Demand], of: Worth) -> float:
    """What the answers of live requests would still bring at their exits."""
    return sum(
        d.weight * d.num_left / (d.num_left + d.num_done) * of.tokens[d.exit_layer] for d in demands
    )


@dataclass(frozen=True)
class Decision:
    exit_layer: int | None
    """None: refused."""
    brings: float
    schedule: DepthSchedule | None = None


def decide(
    demands: Sequence[Demand], of: Worth, latency_ms: float, weight: float = 1.0
) -> Decision:
    """What becomes of a newcomer of 20 prompt tokens and 30 more that may have any exit.

    It may follow the schedules that were measured, too.
    """
    budget = Budget(latency_ms=latency_ms, on_miss=OnMiss.REJECT)
    load = Load(now=0.0, demands=demands, policy=get_policy("deadline"), worth=of.tokens)
    newcomer = Newcomer(
        num_prompt_tokens=20,
        num_output_tokens=30,
        arrival_s=0.0,
        deadlines=budget.deadlines(0.0),
        floor_layer=2,
        weight=weight,
    )
    outlook = Outlook(load, MODEL, EXITS)
    seen: dict[tuple[int, DepthSchedule | None], Forecast] = {}

    def predict(exit_layer: int, newcomer: Newcomer = newcomer, *, limit: float) -> Forecast:
        found = forecast(exit_layer, newcomer, outlook, limit=limit)
        seen[exit_layer, newcomer.schedule] = found
        return found

    values = worths(EXITS, of, weight)
    request = timed_request("r", 20, max_tokens=30, latency_ms=latency_ms)
    sets = {"starts": EXITS, "allowed": EXITS}
    plans = list(
        scheduled_plans(request, newcomer, worth=of, weight=weight, predict=predict, **sets)
    )
    try:
        choice = choose_exit(budget, EXITS, predict, worth=values, schedules=plans)
    except BudgetUnattainableError:
        return Decision(None, 0.0)
    loss = seen[choice.exit_layer, choice.schedule].loss
    assert loss is not None
    scheduled = {plan.schedule: plan.worth for plan in plans}
    worth = scheduled[choice.schedule] if choice.schedule else values[choice.exit_layer]
    return Decision(choice.exit_layer, worth - loss, choice.schedule)


@given(
    demands=rows(),
    table=TABLES,
    measured=MEASURED,
    latency_ms=st.floats(150, 1500),
    weight=st.sampled_from([0.25, 1.0, 4.0]),
    objective=st.sampled_from(sorted(OBJECTIVES)),
)
@settings(max_examples=examples(150), deadline=None)
def test_no_plan_loses_more_than_the_refusal_it_avoids(
    demands: list[Demand],
    table: tuple[float, ...],
    measured: dict[str, float],
    latency_ms: float,
    weight: float,
    objective: str,
) -> None:
    exits = make_exits(*EXITS, scores=table, schedules=measured)
    of = OBJECTIVES[objective].worth(exits)

    assert decide(demands, of, latency_ms, weight).brings >= 0.0


@given(
    demands=rows(),
    table=TABLES,
    measured=MEASURED,
    better=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
    latency_ms=st.floats(150, 1500),
)
@settings(max_examples=examples(150), deadline=None)
def test_a_better_table_never_gives_a_worse_result(
    demands: list[Demand],
    table: tuple[float, ...],
    measured: dict[str, float],
    better: tuple[float, float],
    latency_ms: float,
) -> None:
    improved = tuple(s + up * (1.0 - s) for s, up in zip(table, (*better, 0.0), strict=True))
    remeasured = {name: s + better[0] * (1.0 - s) for name, s in measured.items()}
    quality = OBJECTIVES["quality"]

    def result(scores: tuple[float, ...], schedules: dict[str, float]) -> float:
        of = quality.worth(make_exits(*EXITS, scores=scores, schedules=schedules))
        return worth_of_rest(demands, of) + decide(demands, of, latency_ms).brings

    assert result(improved, remeasured) >= result(table, measured) - 1e-9


@given(
    demands=rows(),
    table=TABLES,
    measured=MEASURED,
    latency_ms=st.floats(150, 1500),
    objective=st.sampled_from(["quality", "attainment"]),
)
@example(  # exits and schedules that are all worth the same
    demands=[],
    table=(0.0, 0.0, 1.0),
    measured={"0:6,10:4": 0.0, "0:4,12:2": 0.0},
    latency_ms=150.0,
    objective="quality",
)
@settings(max_examples=examples(150), deadline=None)
def test_a_schedule_in_the_table_is_one_more_chance_and_never_a_loss(
    demands: list[Demand],
    table: tuple[float, ...],
    measured: dict[str, float],
    latency_ms: float,
    objective: str,
) -> None:
    of = OBJECTIVES[objective]

    without = decide(demands, of.worth(make_exits(*EXITS, scores=table)), latency_ms)
    exits = make_exits(*EXITS, scores=table, schedules=measured)
    found = decide(demands, of.worth(exits), latency_ms)

    assert found.brings >= without.brings
    assert found.brings > without.brings or found.schedule is None or without.exit_layer is None


@given(demands=rows(), table=TABLES, latency_ms=st.floats(150, 1500))
@settings(max_examples=examples(100), deadline=None)
def test_who_is_worth_more_is_let_in_wherever_another_is(
    demands: list[Demand], table: tuple[float, ...], latency_ms: float
) -> None:
    of = OBJECTIVES["quality"].worth(make_exits(*EXITS, scores=table))

    light = decide(demands, of, latency_ms, weight=1.0)
    heavy = decide(demands, of, latency_ms, weight=4.0)

    assert heavy.exit_layer is not None or light.exit_layer is None
    assert (heavy.exit_layer or 0) >= (light.exit_layer or 0)


def test_an_answer_is_refused_rather_than_paid_for_by_better_ones() -> None:
    demands = [make_demand(str(i), 6, due_s=0.0079, num_left=200) for i in range(5)]
    quality = OBJECTIVES["quality"]

    tie = decide(demands, quality.worth(make_exits(*EXITS, scores=(0.9, 1.0, 1.0))), 900)
    babble = decide(demands, quality.worth(make_exits(*EXITS, scores=(0.0, 0.1, 1.0))), 900)
    attained = decide(
        demands, OBJECTIVES["attainment"].worth(make_exits(*EXITS, scores=(0.0, 0.1, 1.0))), 900
    )

    assert tie.exit_layer is not None
    assert tie.brings == pytest.approx(1.0)
    assert babble.exit_layer is None
    assert attained.exit_layer is not None
