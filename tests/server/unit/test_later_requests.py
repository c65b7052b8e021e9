"""A promise that keeps those who come later out is given only if it is worth that."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from sortserve.admission.choose import choose_exit, worths
from sortserve.admission.fit import room_for
from sortserve.admission.forecast import Forecast, forecast
from sortserve.admission.offered import NOTHING_OFFERED, OfferedLoad
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.core.budget import Budget, OnMiss
from sortserve.core.errors import BudgetUnattainableError
from sortserve.scheduling.demand import Demand
from sortserve.scheduling.objective import OBJECTIVES
from sortserve.scheduling.policies.table import get_policy
from support.scripted import make_exits
from support.timed import COSTS, MODEL, make_demand, make_timed, timed_request

EXITS = (2, 4, 6)
MANY = OfferedLoad(share=0.4, worth=200.0)
"""Forty percent of the machine for prompts of 5 ms each, each of an answer that is worth 1."""
TIGHT_MS = 1e3 * 1.5 * 60 * COSTS.decode_s(6, 50)
LOOSE_MS = 6 * TIGHT_MS


def newcomer(latency_ms: float, **changes: object) -> Newcomer:
    made = Newcomer(
        num_prompt_tokens=20,
        num_output_tokens=60,
        arrival_s=0.0,
        deadlines=Budget(latency_ms=latency_ms).deadlines(0.0),
        floor_layer=6,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def loose_answer() -> Demand:
    return make_demand("loose", 6, due_s=0.2, num_left=40)


def outlook(*demands: Demand, offered: OfferedLoad = MANY) -> Outlook:
    load = Load(now=0.0, demands=demands, policy=get_policy("deadline"), offered=offered)
    return Outlook(load, MODEL, EXITS)


def loss(latency_ms: float, *demands: Demand, offered: OfferedLoad = MANY) -> float | None:
    return forecast(6, newcomer(latency_ms), outlook(*demands, offered=offered)).loss


def test_where_many_come_a_tight_promise_costs_them_more_than_it_is_worth() -> None:
    found = loss(TIGHT_MS, loose_answer())

    assert found is not None
    assert found > 1.0


def test_where_nobody_comes_it_costs_nothing() -> None:
    assert loss(TIGHT_MS, loose_answer(), offered=NOTHING_OFFERED) == 0.0


def test_a_promise_with_time_to_spare_costs_little() -> None:
    tight, loose = loss(TIGHT_MS, loose_answer()), loss(LOOSE_MS, loose_answer())

    assert tight is not None
    assert loose is not None
    assert loose < 0.5 < tight


def test_beside_a_promise_as_tight_another_costs_only_what_it_adds() -> None:
    alike = make_demand("alike", 6, due_s=1.4 * COSTS.decode_s(6, 50), num_left=60)

    first, second = loss(TIGHT_MS, loose_answer()), loss(TIGHT_MS, loose_answer(), alike)

    assert first is not None
    assert second is not None
    assert second < 0.3 * first


def test_a_machine_with_nothing_to_do_never_keeps_itself_free() -> None:
    assert loss(TIGHT_MS) == 0.0
    assert loss(TIGHT_MS, make_demand("soft", 6)) == 0.0


def test_who_is_answered_in_any_case_is_charged_nothing() -> None:
    asking = newcomer(TIGHT_MS, may_be_refused=False)

    assert forecast(6, asking, outlook(loose_answer())).loss == 0.0


def test_several_that_come_at_once_are_charged_for_all_of_them() -> None:
    some_time_ms = 1.3 * TIGHT_MS
    alone = forecast(6, newcomer(some_time_ms), outlook(loose_answer())).loss
    together = forecast(6, newcomer(some_time_ms, num_siblings=7), outlook(loose_answer())).loss

    assert alone is not None
    assert together is not None
    assert together > alone


def test_no_search_is_made_for_what_is_refused_in_any_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sortserve.admission.fit.least_lowering", lambda *_, **__: 1 / 0)
    beside = outlook(loose_answer())
    promise = forecast(6, newcomer(TIGHT_MS), beside).promise

    kept, lost = room_for(6, newcomer(TIGHT_MS), [promise], beside, 0.5, present=beside)

    assert (kept, lost) == (promise, None)


@pytest.mark.parametrize(("weight", "gets_in"), [(1.0, False), (100.0, True)])
def test_who_is_worth_more_than_they_are_gets_in(weight: float, gets_in: bool) -> None:
    of = OBJECTIVES["quality"].worth(make_exits(*EXITS, scores=(0.5, 0.8, 1.0)))
    beside, asking = outlook(loose_answer()), newcomer(TIGHT_MS, weight=weight)

    def predict(exit_layer: int, *, limit: float) -> Forecast:
        return forecast(exit_layer, asking, beside, limit=limit)

    budget = Budget(latency_ms=TIGHT_MS, on_miss=OnMiss.REJECT)
    reason = "exit 6 would cost other requests more than it brings"
    expected = nullcontext() if gets_in else pytest.raises(BudgetUnattainableError, match=reason)
    with expected:
        choose_exit(budget, (6,), predict, worth=worths((6,), of, weight))


def test_after_a_crowd_that_was_refused_the_server_still_lets_in() -> None:
    """What arrived counts whether it was let in or not, and can lock nobody out."""
    timed = make_timed()
    for i in range(200):
        request = timed_request(
            f"r{i}", 20, max_tokens=60, at=0.001 * i, latency_ms=TIGHT_MS, on_miss="reject"
        )
        timed.arrive(request)
        timed.step()
    assert len(timed.refusals) > 100
    while timed.engine.has_work:
        timed.step()

    later = timed_request(
        "later", 20, max_tokens=60, at=timed.clock.now, latency_ms=TIGHT_MS, on_miss="reject"
    )
    timed.run([later])

    assert timed.reports["later"].met
