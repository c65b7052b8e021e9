"""What a newcomer is told, and what becomes of it: predictions, exits, refusals, downgrades."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from sortserve.admission.choose import ExitChoice, choose_exit
from sortserve.admission.drain import predicted_drain_s
from sortserve.admission.forecast import Forecast, forecast
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.core.budget import Budget, Deadlines, OnMiss
from sortserve.core.errors import MAX_RETRY_AFTER_S, BudgetUnattainableError, OverloadedError
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.request import Estimate, Request
from sortserve.core.sequence import Promise
from sortserve.cost.model import LEAST, CostModel, Line
from sortserve.scheduling.policies.table import get_policy
from support.timed import MODEL, Timed, make_demand, make_timed, timed_request


def newcomer(**budget: float) -> Newcomer:
    return Newcomer(
        num_prompt_tokens=100,
        num_output_tokens=50,
        arrival_s=0.0,
        deadlines=Budget.from_mapping(budget).deadlines(0.0),
        floor_layer=2,
    )


def load(*demands: Any, policy: str = "deadline") -> Load:
    return Load(now=0.0, demands=demands, policy=get_policy(policy))


# ---- choosing, from given forecasts ----


WORTH = {9: 0.3, 15: 0.5, 30: 1.0}


def predict(exit_layer: int, *, limit: float = math.inf) -> Forecast:
    """Exit 9 takes 180 ms, exit 15 300 ms, exit 30 600 ms; at 30 others lose 0.6 for it."""
    estimate = Estimate(0.01 * exit_layer, 0.001 * exit_layer, 0.02 * exit_layer)
    promise = Promise(Deadlines(), 0.0, 1.0)
    loss = 0.0 if exit_layer <= 15 else 0.6
    return Forecast(estimate, loss if loss <= limit else None, promise)


def test_the_deepest_exit_that_keeps_everything_is_chosen() -> None:
    choice = choose_exit(Budget(latency_ms=400), (9, 15, 30), predict, worth=WORTH)

    assert (choice.exit_layer, choice.floor_layer, choice.fits) == (15, 9, True)
    assert choice.promise is not None


def test_without_a_time_nothing_is_promised() -> None:
    choice = choose_exit(Budget(), (9, 15), predict, worth=WORTH)

    assert (choice.exit_layer, choice.promise) == (15, None)


def test_if_it_fits_only_once_others_are_shallower_it_gets_its_floor() -> None:
    choice = choose_exit(Budget(latency_ms=500), (30,), predict, worth=WORTH)

    assert (choice.exit_layer, choice.fits) == (30, True)
    assert choice.promise is not None


def never(exit_layer: int, *, limit: float) -> Forecast:
    return dataclasses.replace(predict(exit_layer), loss=None)


def test_when_nothing_fits_degrade_serves_the_shallowest_without_a_promise() -> None:
    choice = choose_exit(Budget(latency_ms=1), (9, 15, 30), never, worth=WORTH)

    assert (choice.exit_layer, choice.fits, choice.promise) == (9, False, None)


@pytest.mark.parametrize(("drain_s", "retry_after_s"), [(None, 1.0), (7.5, 7.5), (0.2, 1.0)])
def test_when_nothing_fits_reject_answers_with_the_time_until_it_would(
    drain_s: float | None, retry_after_s: float
) -> None:
    budget = Budget(latency_ms=1, on_miss=OnMiss.REJECT)

    with pytest.raises(BudgetUnattainableError, match="exit 9, needs 180 ms") as error:
        choose_exit(budget, (9, 15, 30), never, worth=WORTH, drain_s=lambda: drain_s)

    assert error.value.param == "budget.latency_ms"
    assert error.value.retry_after_s == retry_after_s


@pytest.mark.parametrize(
    ("predicted_s", "told_s"),
    [(1e300, MAX_RETRY_AFTER_S), (math.inf, MAX_RETRY_AFTER_S), (math.nan, 0.0), (-5.0, 0.0)],
)
def test_whatever_was_predicted_nobody_is_told_to_stay_away_for_more_than_an_hour(
    predicted_s: float, told_s: float
) -> None:
    assert OverloadedError("full", retry_after_s=predicted_s).retry_after_s == told_s


def test_a_time_that_is_past_is_promised_to_nobody_however_fast_the_machine() -> None:
    fast = CostModel(LEAST, LEAST)
    late = dataclasses.replace(
        newcomer(latency_ms=10), arrival_s=-1.0, deadlines=Deadlines(e2e_s=-0.9)
    )

    found = forecast(2, late, Outlook(load(), fast, (2, 4, 6)))

    assert found.loss is None


def test_a_refusal_for_the_sake_of_others_says_so() -> None:
    budget = Budget(latency_ms=5000, on_miss=OnMiss.REJECT)

    with pytest.raises(
        BudgetUnattainableError, match="would cost other requests more than it brings"
    ):
        choose_exit(budget, (9, 15, 30), never, worth=WORTH)


def test_without_calibration_the_deepest_exit_is_taken_on_trust() -> None:
    timed = make_timed()
    timed.engine.costs.use(None)

    choice = timed.desk.choose(timed_request("r", latency_ms=1), (2, 4, 6))

    assert choice == ExitChoice(6, None, fits=True, floor_layer=2)
    assert timed.desk.estimate(6, 10, 10) is None


# ---- forecasts ----


def e2e_s(exit_layer: int, *demands: Any, policy: str = "deadline") -> float:
    return forecast(
        exit_layer, newcomer(), Outlook(load(*demands, policy=policy), MODEL, (2, 4, 6))
    ).estimate.e2e_s


def test_a_shallower_exit_is_predicted_faster_and_a_loaded_engine_slower() -> None:
    busy = [make_demand(str(i), 6) for i in range(8)]
    queued = make_demand("prompt", 6, num_pending=2000)

    assert e2e_s(2) < e2e_s(4) < e2e_s(6)
    assert e2e_s(2, *busy) > e2e_s(2)
    assert e2e_s(6, *busy, queued) > e2e_s(6, *busy)


def test_in_lockstep_a_shallow_exit_beside_deep_rows_gains_no_tpot() -> None:
    deep = [make_demand(str(i), 6) for i in range(8)]

    def tpot(policy: str) -> float:
        return forecast(
            2, newcomer(), Outlook(load(*deep, policy=policy), MODEL, (2, 4, 6))
        ).estimate.tpot_s

    assert tpot("fair") < 0.8 * tpot("lockstep")


@pytest.mark.parametrize(
    ("budget", "keeps"),
    [
        ({"latency_ms": 1000}, True),
        ({"latency_ms": 300}, False),
        ({"tpot_ms": 10}, True),
        ({"tpot_ms": 7}, False),
        ({"ttft_ms": 100}, True),
        ({"ttft_ms": 5}, False),
        ({"ttft_ms": 100, "tpot_ms": 7}, False),
        ({"ttft_ms": 100, "tpot_ms": 10, "latency_ms": 600}, True),
    ],
)
def test_each_kind_of_bound_is_judged_on_an_idle_machine(
    budget: dict[str, float], keeps: bool
) -> None:
    # A step at exit 6 takes 7 ms, with the safety factor 7.7 ms; fifty of them 385 ms.
    assert forecast(6, newcomer(**budget), Outlook(load(), MODEL, (2, 4, 6))).loss == (
        0.0 if keeps else None
    )


def test_a_promise_to_others_is_not_broken_for_a_newcomer() -> None:
    tight = [make_demand(f"t{i}", 2, due_s=0.01, gap_s=0.0045, floor_layer=2) for i in range(3)]

    found = forecast(6, newcomer(latency_ms=500), Outlook(load(*tight), MODEL, (2, 4, 6)))

    assert found.loss is None


def test_room_can_come_from_others_going_shallower() -> None:
    tight = [make_demand(f"t{i}", 6, due_s=0.0078, num_left=300, floor_layer=2) for i in range(2)]

    found = forecast(2, newcomer(latency_ms=600), Outlook(load(*tight), MODEL, (2, 4, 6)))

    assert found.loss is not None
    assert found.loss > 0.0


def test_retry_after_is_when_enough_promises_have_ended() -> None:
    tight = [
        dataclasses.replace(
            make_demand(f"t{i}", 2, due_s=0.01, gap_s=0.0034, floor_layer=2),
            num_left=300 * (1 + i),
        )
        for i in range(3)
    ]

    found = predicted_drain_s(2, newcomer(latency_ms=500), load(*tight), MODEL)

    assert found == pytest.approx(900 * 0.0034)
    assert predicted_drain_s(2, newcomer(latency_ms=1), load(*tight), MODEL) is None


# ---- through the whole engine, with steps that take time ----


def run(*requests: Any, **config: Any) -> Timed:
    timed = make_timed(**config)
    timed.run(requests)
    return timed


@pytest.mark.parametrize(("latency_ms", "exit_layer"), [(200, 6), (75, 4), (40, 2)])
def test_slack_is_spent_on_depth(latency_ms: float, exit_layer: int) -> None:
    timed = run(timed_request("r", max_tokens=10, latency_ms=latency_ms))

    report = timed.reports["r"]
    assert report.tokens_by_exit == {exit_layer: 10}
    assert report.met is True
    assert report.outcome == "met"


def test_the_floor_is_kept_and_the_budget_missed_where_both_cannot_be() -> None:
    report = run(timed_request("r", latency_ms=30, min_exit_layer=4)).reports["r"]

    assert report.tokens_by_exit == {4: 10}
    assert (report.met, report.outcome) == (False, "degraded")


def test_a_request_goes_shallower_in_flight_to_let_a_tighter_one_in() -> None:
    timed = run(
        timed_request("first", max_tokens=100, latency_ms=900),
        timed_request("second", max_tokens=60, latency_ms=450, at=0.05),
    )

    reports = timed.reports
    assert reports["first"].met is True
    assert reports["second"].met is True
    assert len(reports["first"].tokens_by_exit) > 1
    assert list(reports["first"].tokens_by_exit) == sorted(
        reports["first"].tokens_by_exit, reverse=True
    )


def test_an_explicit_exit_never_changes() -> None:
    timed = run(
        timed_request("fixed", max_tokens=60, exit_layer=6, latency_ms=600),
        timed_request("plain", max_tokens=60, exit_layer=6),
        *(timed_request(f"t{i}", max_tokens=40, latency_ms=350, at=0.02) for i in range(6)),
    )

    assert timed.reports["fixed"].tokens_by_exit == {6: 60}
    assert timed.reports["plain"].tokens_by_exit == {6: 60}


def test_an_unbudgeted_request_does_not_starve_beside_promises() -> None:
    timed = make_timed()
    arrivals = [
        timed_request(f"t{i}", max_tokens=20, latency_ms=130, on_miss="reject", at=0.05 * i)
        for i in range(100)
    ]

    timed.run([timed_request("plain", max_tokens=20, exit_layer=6), *arrivals])

    plain = timed.reports["plain"]
    assert plain.num_output_tokens == 20
    assert plain.e2e_s < 4.0
    met = [r.met for id_, r in timed.reports.items() if id_ != "plain"]
    assert sum(map(bool, met)) >= 0.95 * len(met)


def test_overload_lowers_the_depth_of_unbudgeted_requests_and_calm_raises_it() -> None:
    timed = make_timed(overload_degrade=True, overload_delay_s=0.2, max_num_seqs=4)
    burst = [timed_request(f"b{i}", 200, max_tokens=5, at=0.001 * i) for i in range(50)]
    calm = [timed_request(f"c{i}", 10, max_tokens=2, at=50.0 + i) for i in range(9)]

    timed.run([*burst, *calm, timed_request("after", 10, at=60.0)])

    exits = {id_: choice.exit_layer for id_, choice in timed.choices.items()}
    assert exits["b0"] == 6
    assert min(exits.values()) < 6
    assert exits["after"] == 6


def crowd(**budget: Any) -> list[Request]:
    """More long prompts at once than can be read in the time that counts as overload."""
    return [timed_request(f"b{i}", 200, max_tokens=5, at=0.01 * i, **budget) for i in range(150)]


def depths(timed: Timed) -> set[int]:
    """The exits that any token was made at."""
    return {e for report in timed.reports.values() for e in report.tokens_by_exit}


@pytest.mark.parametrize(
    ("budget", "overload_degrade", "lowest"),
    [
        pytest.param({}, False, 6, id="no budget"),
        pytest.param({"compute": 1.0}, False, 6, id="no floor"),
        pytest.param({}, True, 4, id="no budget, but the server may"),
        pytest.param({"min_quality": 0.5}, False, 4, id="a floor of quality"),
        pytest.param({"min_exit_layer": 2}, False, 2, id="a floor of depth"),
        pytest.param({"exit_layer": 6}, True, 6, id="the exit itself"),
    ],
)
def test_overload_makes_nobody_shallower_who_did_not_ask_for_it(
    budget: dict[str, Any], overload_degrade: bool, lowest: int
) -> None:
    timed = make_timed(
        overload_degrade=overload_degrade,
        overload_delay_s=0.2,
        min_quality=0.5,  # exit 2 has a score of 0.33
        max_num_seqs=4,
    )

    timed.run(crowd(**budget))

    assert min(depths(timed)) == lowest
    assert any(r.degraded for r in timed.reports.values()) == (lowest < 6)


@pytest.mark.parametrize(("overload_degrade", "floor_layer"), [(False, 6), (True, 2)])
def test_the_policy_may_lower_a_running_request_without_a_budget_only_if_the_server_says_so(
    overload_degrade: bool, floor_layer: int
) -> None:
    timed = make_timed(overload_degrade=overload_degrade)
    timed.arrive(timed_request("plain"))
    timed.step()

    (demand,) = timed.engine.demands()

    assert (demand.exit_layer, demand.floor_layer) == (6, floor_layer)


def test_a_floor_that_the_server_sets_for_a_form_is_no_leave_to_take_depth() -> None:
    timed = make_timed(overload_delay_s=0.2)
    formed = Budget(structured_min_quality=0.1)

    timed.run([replace(request, budget=formed) for request in crowd()])

    assert depths(timed) == {6}


@pytest.mark.parametrize("kind", ["seed", "one of several"])
def test_a_repeatable_request_and_one_of_several_keep_the_exit_they_start_at(kind: str) -> None:
    timed = make_timed(overload_degrade=True)
    request = timed_request("r")
    if kind == "seed":
        request = replace(request, sampling=replace(request.sampling, seed=7))
    else:
        request = replace(request, is_one_of_several=True)
    timed_too = replace(request, budget=Budget(latency_ms=1e4))

    assert timed.desk.choose(request, (2, 4, 6)).floor_layer == 6
    assert timed.desk.choose(timed_too, (2, 4, 6)).floor_layer == 2


def test_nobody_goes_in_flight_through_an_exit_that_is_worse_than_a_shallower_one() -> None:
    timed = make_timed()
    request = timed_request("r", latency_ms=1e4, min_quality=0.5)

    choice = timed.desk.choose(request, (2, 6))  # exit 4 was measured worse than exit 2

    assert (choice.exit_layer, choice.floor_layer) == (6, 6)
    assert timed.desk.choose(request, (2, 6), exit_layer=2).floor_layer == 2


@pytest.mark.parametrize(
    ("objective", "floor_layer"), [("quality", 2), ("attainment", 2), ("depth", 6)]
)
def test_an_exit_that_ties_a_shallower_one_is_none_to_stop_at(
    objective: str, floor_layer: int
) -> None:
    """A table in which a shallower exit is better leaves no promise with less room."""
    timed = make_timed(scores=(0.7, 0.7, 1.0), objective=objective)

    choice = timed.desk.choose(timed_request("r", latency_ms=1e4), (2, 4, 6))

    assert (choice.exit_layer, choice.floor_layer) == (6, floor_layer)


def test_after_an_idle_while_nobody_pays_for_an_overload_that_is_long_over() -> None:
    timed = make_timed(overload_degrade=True, overload_delay_s=0.2, max_num_seqs=4)

    timed.run([*crowd(), timed_request("much later", at=3600.0)])

    assert min(depths(timed)) < 6
    assert timed.reports["much later"].tokens_by_exit == {6: 10}


def test_a_request_that_expired_in_the_queue_never_runs() -> None:
    timed = make_timed(max_num_seqs=1)
    fast: Line = (1e-4, 1e-4, 1e-6, 1e-9, 1e-6)
    timed.engine.costs.use(CostModel(fast, fast))  # ten times faster than the truth
    hog = timed_request("hog", max_tokens=100, exit_layer=6)
    late = timed_request("late", ttft_ms=100, on_miss="reject", at=0.001)
    cut = timed_request("cut", latency_ms=200, on_miss="truncate", at=0.002)

    timed.run([hog, late, cut])

    ran = {row.request_id for plan in timed.runner.plans for row in plan.rows}
    assert ran == {"hog"}
    assert timed.errors["late"].status == 429
    retry_after_s = timed.errors["late"].retry_after_s
    assert retry_after_s is not None
    assert retry_after_s < 0.1  # what is left of the hog, as the model believes
    assert timed.reports["cut"].finish_reason == "deadline"


def test_a_truncated_request_is_paced_and_stops_in_time() -> None:
    report = run(timed_request("r", max_tokens=200, latency_ms=300, on_miss="truncate"))
    done = report.reports["r"]

    assert done.finish_reason == "deadline"
    assert done.met is True
    assert done.num_output_tokens > 50


def test_under_twice_the_load_those_let_in_are_served_in_time_and_the_rest_is_told_when() -> None:
    rng = random.Random(4)
    timed = make_timed(seed=4)
    arrivals = [
        timed_request(
            f"r{i}",
            rng.randint(10, 100),
            max_tokens=rng.randint(5, 60),
            latency_ms=rng.choice((250, 500, 1500)),
            on_miss="reject",
            at=i / 60,
        )
        for i in range(120)
    ]

    timed.run(arrivals)

    assert len(timed.reports) + len(timed.refusals) == 120
    met = [report.met for report in timed.reports.values()]
    assert timed.refusals
    assert sum(map(bool, met)) >= 0.9 * len(met)
    assert all((e.retry_after_s or 0) >= 1.0 for e in timed.refusals.values())
    assert timed.engine.stats().kv_pages_used == 0


def test_who_is_refused_for_time_lost_on_the_way_may_come_back_at_once() -> None:
    timed = make_timed()
    timed.clock.now = 10.0
    lost = timed_request("r", at=0.0, latency_ms=900, on_miss="reject")

    with pytest.raises(BudgetUnattainableError) as error:
        timed.desk.choose(lost, (2, 4, 6))

    assert error.value.retry_after_s == 1.0


def test_the_head_over_a_prompt_that_is_judged_is_counted_before_it_runs() -> None:
    model = CostModel((0.0, 0.0, 1e-6, 0.0, 1e-3), (0.0, 0.0, 1e-6, 0.0, 1e-3), safety=1.0)
    timed = make_timed()
    timed.engine.costs.use(model)
    plain = timed_request("r", 100, ttft_ms=50, on_miss="reject")
    judged = replace(plain, prompt_logprobs=PromptLogprobs(plain.prompt_token_ids, 0))

    assert timed.desk.choose(plain, (6,)).fits
    with pytest.raises(BudgetUnattainableError, match="needs 1"):
        timed.desk.choose(judged, (6,))
