"""Whatever the cost model says, zeros and infinities included: a step is chosen, times are finite.

A model may be fitted to a busy machine or learned from odd steps. So nothing here asks whether its
times are right: only that nothing raises, that somebody gets on in every step, and that what a
client is told is a number or None.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sortserve.admission.choose import choose_exit
from sortserve.admission.drain import predicted_drain_s
from sortserve.admission.forecast import Forecast, forecast
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.admission.overload import DepthLevel, next_level
from sortserve.core.budget import Budget, Deadlines
from sortserve.core.errors import MAX_RETRY_AFTER_S, BudgetUnattainableError
from sortserve.core.request import Estimate
from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, Line, RowShape, StepShape
from sortserve.scheduling.capacity import pressure
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.lowering import lower
from sortserve.scheduling.objective import Worth
from sortserve.scheduling.policies.deadline import (
    deadline,
    least_slack_first,
    most_slack_last_admitted,
)
from sortserve.scheduling.policies.fair import fair
from sortserve.scheduling.policies.lockstep import lockstep
from sortserve.scheduling.policies.table import DEFAULT_POLICY, POLICIES, get_policy
from sortserve.scheduling.policy import DepthClass, Situation
from support.examples import examples
from support.timed import make_timed, timed_request

EXITS = (2, 4, 6)
NOW = 1000.0
NOTHING: Line = (0.0, 0.0, 0.0, 0.0, 0.0)
ODD = (0.0, -0.0, 5e-324, 1e-300, 1e-12, 1e-3, 1.0, 1e6, 1e300, math.inf, -1.0, -math.inf)

COEFFICIENTS = st.sampled_from(ODD) | st.floats(0.0, 1e-2)
LINES: st.SearchStrategy[Line] = st.tuples(*[COEFFICIENTS] * 5)
MODELS = st.builds(CostModel, LINES, LINES, safety=st.sampled_from(ODD) | st.floats(1.0, 2.0))
COUNTS = st.sampled_from([1, 2, 31, 32, 33, 500, 100_000])


@st.composite
def demands(draw: st.DrawFn, request_id: str = "r") -> Demand:
    """Any demand that a live request could have, past due or due in a year."""
    exit_layer, is_promised = draw(st.sampled_from(EXITS)), draw(st.booleans())
    is_decoding = draw(st.booleans())
    times = st.sampled_from([0.0, NOW - 1, NOW, NOW + 1e-9, NOW + 1, NOW + 3e7])
    gaps = st.sampled_from([0.0, 1e-6, 1e-3, 1.0])
    return Demand(
        request_id=request_id,
        exit_layer=exit_layer,
        floor_layer=draw(st.sampled_from([e for e in EXITS if e <= exit_layer])),
        order=draw(st.sampled_from([NOW - 3, NOW - 2])),
        num_pending=1 if is_decoding else draw(COUNTS),
        context_len=draw(COUNTS) if is_decoding else draw(st.sampled_from([0, 64])),
        is_waiting=draw(st.booleans()),
        is_promised=is_promised,
        is_hard=is_promised and draw(st.booleans()),
        due_s=draw(times),
        gap_s=draw(gaps),
        end_s=draw(times) if is_promised else math.inf,
    )


@st.composite
def loads(draw: st.DrawFn, *, min_size: int = 0) -> list[Demand]:
    count = draw(st.integers(min_size, 9))
    return [draw(demands(str(i))) for i in range(count)]


@st.composite
def newcomers(draw: st.DrawFn) -> Newcomer:
    times = st.none() | st.sampled_from([NOW - 10, NOW, NOW + 1e-3, NOW + 5, NOW + 86400])
    return Newcomer(
        num_prompt_tokens=draw(COUNTS),
        num_output_tokens=draw(COUNTS),
        arrival_s=draw(st.sampled_from([NOW, NOW - 5])),
        deadlines=Deadlines(
            ttft_s=draw(times),
            e2e_s=draw(times),
            tpot_s=draw(st.none() | st.sampled_from([1e-6, 0.01, 86400.0])),
        ),
        floor_layer=2,
    )


def is_sound(estimate: Estimate) -> bool:
    """Numbers that a client can be told."""
    times = (estimate.ttft_s, estimate.tpot_s, estimate.e2e_s)
    return all(math.isfinite(seconds) and seconds >= 0.0 for seconds in times)


# ---- policies ----


@given(
    rows=loads(min_size=1),
    model=MODELS,
    max_num_tokens=st.sampled_from([1, 2, 8, 1024]),
    service=st.lists(st.sampled_from([0.0, 1.0, 1e9]), min_size=3, max_size=3),
    safety=st.sampled_from([1.0, 1.2]),
)
@example(
    rows=[
        Demand("a", 6, 2, 0.0, 1, 10, False, True, True, NOW + 1, 0.1, NOW + 9),
        Demand("b", 6, 2, 0.0, 90, 0, False, True, True, NOW + 1, 0.1, NOW + 9),
    ],
    model=CostModel(NOTHING, NOTHING),
    max_num_tokens=1024,
    service=[0.0, 0.0, 0.0],
    safety=1.0,
)
@settings(max_examples=examples(120), deadline=None)
def test_every_step_has_a_row_that_gets_on_and_none_that_it_does_not_reach(
    rows: list[Demand], model: CostModel, max_num_tokens: int, service: list[float], safety: float
) -> None:
    costs = StepCosts(model, num_rows=len(rows), safety=safety)
    layers = sorted({d.exit_layer for d in rows}, reverse=True)
    classes = [DepthClass(e, 1, float(e), s) for e, s in zip(layers, service, strict=False)]

    choice = deadline(Situation(NOW, rows, classes, costs, max_num_tokens))

    chosen = [d for d in rows if d.request_id in choice.request_ids]
    assert len(chosen) == len(choice.request_ids) > 0
    assert all(d.exit_layer <= choice.cap for d in chosen)
    assert choice.cap in layers
    assert choice.num_prompt_tokens > 0 or all(d.is_decoding for d in chosen)
    assert fair(classes) in layers
    assert lockstep(classes) == layers[0]


@given(rows=loads(min_size=1), model=MODELS)
@settings(max_examples=examples(80), deadline=None)
def test_everybody_has_a_place_in_the_order_of_entry_and_one_of_them_leaves_first(
    rows: list[Demand], model: CostModel
) -> None:
    ordered = least_slack_first(rows, StepCosts(model))

    assert sorted(d.request_id for d in ordered) == [d.request_id for d in rows]
    assert most_slack_last_admitted(rows) in {d.request_id for d in rows}


@given(
    rows=loads(),
    model=MODELS,
    busy_s=st.sampled_from([0.0, 1.0]),
    worth=st.sampled_from([[0.2, 0.5, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1e6, 2e6, 3e6]]),
)
@settings(max_examples=examples(80), deadline=None)
def test_the_pressure_is_a_number_and_nobody_goes_deeper_or_below_the_floor(
    rows: list[Demand], model: CostModel, busy_s: float, worth: list[float]
) -> None:
    costs = StepCosts(model, num_rows=len(rows), safety=model.safety)

    needed = pressure(rows, costs, now=NOW, busy_s=busy_s)
    least = pressure([d.at(d.floor_layer) for d in rows], costs, now=NOW, busy_s=busy_s)
    values = dict(zip(EXITS, worth, strict=True))
    lowered = dict(lower(rows, EXITS, costs, NOW, Worth(values, values)))

    assert 0.0 <= needed < math.inf
    assert 0.0 <= least < math.inf
    by_id = {d.request_id: d for d in rows}
    for request_id, exit_layer in lowered.items():
        assert by_id[request_id].floor_layer <= exit_layer < by_id[request_id].exit_layer
        assert exit_layer in EXITS


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    costs=st.dictionaries(st.sampled_from(EXITS), st.floats(0.0, 1e22), min_size=1),
)
@example(policy="fair", costs={2: 0.0, 6: 0.0})
@example(policy="lockstep", costs={2: 0.0})
@settings(max_examples=examples(80), deadline=None)
def test_the_rates_of_steps_are_above_zero_and_finite(policy: str, costs: dict[int, float]) -> None:
    rates = get_policy(policy).rates(costs)

    assert rates.keys() == costs.keys()
    assert all(0.0 < rate < math.inf for rate in rates.values())


# ---- what a newcomer is told ----


@given(
    exit_layer=st.sampled_from(EXITS),
    newcomer=newcomers(),
    rows=loads(),
    model=MODELS,
    policy=st.sampled_from(sorted(POLICIES)),
    chunk=st.sampled_from([1, 16, 1024]),
)
@settings(max_examples=examples(120), deadline=None)
def test_forecasts_and_drain_times_are_numbers_or_none(
    exit_layer: int,
    newcomer: Newcomer,
    rows: list[Demand],
    model: CostModel,
    policy: str,
    chunk: int,
) -> None:
    judged_by = get_policy(policy)
    load = Load(now=NOW, demands=rows, policy=judged_by, max_num_batched_tokens=chunk)

    found = forecast(exit_layer, newcomer, Outlook(load, model, EXITS))
    drained_s = predicted_drain_s(exit_layer, newcomer, load, model)

    assert is_sound(found.estimate)
    assert drained_s is None or 0.0 <= drained_s < math.inf
    if judged_by.keeps_promises and newcomer.bounds_time and found.loss is not None:
        assert found.promise.first_due_s > NOW, "no time is promised that is past"


@given(
    budget=st.builds(
        Budget,
        latency_ms=st.none() | st.sampled_from([1e-3, 1, 500, 86_400_000]),
        tpot_ms=st.none() | st.sampled_from([1e-3, 20, 86_400_000]),
        on_miss=st.sampled_from(["reject", "degrade", "truncate"]),
    ),
    tokens=st.tuples(COUNTS, COUNTS),
    rows=loads(),
    model=MODELS,
)
@settings(max_examples=examples(80), deadline=None)
def test_a_request_gets_an_allowed_exit_or_a_time_to_come_back(
    budget: Budget, tokens: tuple[int, int], rows: list[Demand], model: CostModel
) -> None:
    load = Load(now=NOW, demands=rows, policy=get_policy(DEFAULT_POLICY))
    newcomer = Newcomer(
        num_prompt_tokens=tokens[0],
        num_output_tokens=tokens[1],
        arrival_s=NOW,
        deadlines=budget.deadlines(NOW),
        floor_layer=2,
    )

    outlook = Outlook(load, model, EXITS)

    def predict(exit_layer: int, *, limit: float = 10.0) -> Forecast:
        return forecast(exit_layer, newcomer, outlook, limit=limit)

    def drain_s() -> float | None:
        return predicted_drain_s(2, newcomer, load, model)

    worth = {2: 10.0, 4: 11.0, 6: 12.0}
    fits = any(predict(e, limit=worth[e]).loss is not None for e in EXITS)
    if budget.on_miss == "reject" and not fits:
        with pytest.raises(BudgetUnattainableError) as refusal:
            choose_exit(budget, EXITS, predict, worth=worth, drain_s=drain_s)
        assert refusal.value.retry_after_s is not None
        assert 1.0 <= refusal.value.retry_after_s <= MAX_RETRY_AFTER_S
        assert not {"nan", "inf"} & set(refusal.value.message.split())
        return
    choice = choose_exit(budget, EXITS, predict, worth=worth, drain_s=drain_s)
    assert choice.exit_layer in EXITS
    assert choice.fits is fits
    assert choice.estimate is not None
    assert is_sound(choice.estimate)


@given(
    delays=st.lists(st.floats(allow_nan=True), max_size=20),
    num_exits=st.integers(1, 5),
    limit_s=st.floats(0.0, 100.0),
)
def test_overload_takes_the_depth_to_an_exit_there_is(
    delays: list[float], num_exits: int, limit_s: float
) -> None:
    level, layers = DepthLevel(), tuple(range(1, num_exits + 1))

    for now, delay_s in enumerate(delays):
        level = next_level(
            level, queue_delay_s=delay_s, limit_s=limit_s, num_exits=num_exits, now=float(now)
        )
        assert level.up_to(layers, layers) == layers[: max(1, num_exits - level.num_down)]


# ---- what is learned ----


@given(
    samples=st.lists(st.floats(0.0, math.inf), min_size=1, max_size=12),
    steps=st.lists(
        st.tuples(
            st.floats(allow_nan=True) | st.floats(1e-4, 1.0),
            st.sampled_from(EXITS),
            st.sampled_from([0, 1, 40, 64, 5000]),
            st.sampled_from([1, 5000, 10**6]),
        ),
        max_size=60,
    ),
)
@settings(max_examples=examples(80), deadline=None)
def test_nothing_that_is_learned_makes_a_time_that_is_none(
    samples: list[float], steps: list[tuple[float, int, int, int]]
) -> None:
    shapes = itertools.cycle([StepShape.of([RowShape(6, n, n, samples=True)]) for n in (1, 90)])
    measured = [(next(shapes), seconds) for seconds in samples]
    learner = CostLearner([*measured, (StepShape.of([RowShape(2, 1, 9, samples=True)]), 1e-3)])

    for seconds, exit_layer, num_tokens, context_len in steps:
        rows = [RowShape(exit_layer, num_tokens, context_len + num_tokens, samples=True)] * 3
        learner.observe(StepShape.of(rows if num_tokens else []), seconds)

    assert all(0.0 < learner.model.step_s(shape) < math.inf for shape, _ in measured)


# ---- through the whole engine ----


def test_two_plain_requests_beside_each_other_after_a_calibration_without_prompts() -> None:
    """What ended servers: steps that all took as long, so a token of a prompt seemed to be free."""
    rows = [StepShape.of([RowShape(e, 1, 16, samples=True)] * n) for e in EXITS for n in (1, 4)]
    timed = make_timed()
    timed.engine.costs.use(CostModel.fit([(shape, 0.05) for shape in rows]))
    first = timed_request("Hello there", 2, max_tokens=100)

    timed.run([first, timed_request("hi", 1, max_tokens=2, at=0.2), timed_request("or", 9, at=0.3)])

    assert {i: r.num_output_tokens for i, r in timed.reports.items()} == {
        "Hello there": 100,
        "hi": 2,
        "or": 10,
    }
    assert not any(plan.policy_failed for plan in timed.runner.plans)


@given(
    model=MODELS,
    policy=st.sampled_from(sorted(POLICIES)),
    budgets=st.lists(
        st.fixed_dictionaries(
            {"on_miss": st.sampled_from(["reject", "degrade", "truncate"])},
            optional={
                "latency_ms": st.sampled_from([5, 300, 5000]),
                "tpot_ms": st.sampled_from([0.5, 20]),
                "min_exit_layer": st.sampled_from(EXITS),
            },
        ),
        min_size=1,
        max_size=7,
    ),
    num_pages=st.sampled_from([90, 800]),
    chunk=st.sampled_from([2, 64, 1024]),
    overload_delay_s=st.sampled_from([0.0, 0.5]),
)
@example(
    model=CostModel(NOTHING, NOTHING),
    policy="deadline",
    budgets=[{"on_miss": "degrade"}, {"on_miss": "degrade", "latency_ms": 300}],
    num_pages=800,
    chunk=1024,
    overload_delay_s=0.5,
)
@settings(max_examples=examples(30), deadline=None)
def test_everybody_is_answered_in_numbers_and_no_policy_fails(
    model: CostModel,
    policy: str,
    budgets: list[dict[str, Any]],
    num_pages: int,
    chunk: int,
    overload_delay_s: float,
) -> None:
    timed = make_timed(
        policy=policy,
        num_pages=num_pages,
        max_num_batched_tokens=chunk,
        overload_delay_s=overload_delay_s,
    )
    timed.engine.costs.use(model)
    workload = [
        timed_request(str(i), (1, 9, 40)[i % 3], max_tokens=8, at=0.01 * i, **budget)
        for i, budget in enumerate(budgets)
    ]

    timed.run(workload)

    assert set(timed.reports) | set(timed.refusals) == {r.request_id for r in workload}
    assert not any(plan.policy_failed for plan in timed.runner.plans)
    assert timed.engine.stats().kv_pages_used == 0
    for report in timed.reports.values():
        json.dumps(report.budget_reply(), allow_nan=False)
    estimate = timed.desk.estimate(6, 100, 100)
    assert estimate is not None
    assert is_sound(estimate)
