"""Depth schedules that the checkpoint's table holds: the server chooses them as it does exits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from sortserve.admission.choose import ScheduledPlan, choose_exit
from sortserve.admission.forecast import Forecast, forecast, siblings
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.admission.plans import scheduled_plans
from sortserve.core.budget import Budget, Deadlines
from sortserve.core.prompt_logprobs import PromptLogprobs
from sortserve.core.request import Estimate, Request
from sortserve.core.schedule import DepthSchedule
from sortserve.core.sequence import Promise
from sortserve.scheduling.objective import OBJECTIVES
from sortserve.scheduling.policies.table import get_policy
from support.scripted import depth_letter, make_exits
from support.timed import MODEL, Timed, make_timed, timed_request

FALLING = "0:6,10:2"
SCHEDULE = DepthSchedule.parse(FALLING)
SCORES = (0.3, 0.7, 1.0)

# ---- choosing, from given forecasts ----


def found(loss: float | None, tpot_s: float = 0.01) -> Forecast:
    return Forecast(Estimate(0.1, tpot_s, 1.0), loss, Promise(Deadlines(), 0.0, 1.0))


def choose(
    losses: dict[int, float | None], scheduled: float | None, worth: float, **budget: Any
) -> tuple[int, DepthSchedule | None, bool]:
    """Of exits 2, 4, 6 and a schedule, where others lose so much for each; None: no room."""

    def predict(exit_layer: int, *, limit: float) -> Forecast:
        loss = losses[exit_layer]
        return found(loss if loss is not None and loss <= limit else None, exit_layer / 100)

    def follow(*, limit: float) -> Forecast:
        return found(scheduled if scheduled is not None and scheduled <= limit else None)

    plan = ScheduledPlan(SCHEDULE, worth, follow)
    choice = choose_exit(
        Budget(latency_ms=1000, **budget),
        (2, 4, 6),
        predict,
        worth={2: 0.3, 4: 0.7, 6: 1.0},
        schedules=[plan],
    )
    if not choice.fits:
        assert choice.estimate is not None
        assert choice.estimate.tpot_s == 0.02, "what is told is the floor's"
    return choice.exit_layer, choice.schedule, choice.fits


@pytest.mark.parametrize(
    ("losses", "scheduled", "worth", "expected"),
    [
        ({2: 0.0, 4: 0.0, 6: 0.0}, 0.0, 0.8, (6, None, True)),
        ({2: 0.0, 4: 0.0, 6: None}, 0.0, 0.8, (6, SCHEDULE, True)),
        ({2: 0.0, 4: 0.0, 6: 0.5}, 0.1, 0.8, (6, SCHEDULE, True)),
        ({2: 0.0, 4: 0.0, 6: None}, 0.2, 0.8, (4, None, True)),
        ({2: 0.0, 4: 0.0, 6: None}, 0.0, 0.6, (4, None, True)),
        ({2: 0.0, 4: 0.0, 6: None}, 0.0, 0.7, (4, None, True)),
        ({2: 0.0, 4: None, 6: None}, None, 0.8, (2, None, True)),
        ({2: None, 4: None, 6: None}, 0.0, 0.2, (6, SCHEDULE, True)),
        ({2: None, 4: None, 6: None}, None, 0.8, (2, None, False)),
        ({2: None, 4: None, 6: None}, None, 0.2, (2, None, False)),
        ({2: 0.0, 4: 0.0, 6: 0.0}, 0.0, 1.0, (6, None, True)),
    ],
)
def test_the_plan_that_brings_most_is_taken_be_it_an_exit_or_a_schedule(
    losses: dict[int, float | None],
    scheduled: float | None,
    worth: float,
    expected: tuple[int, DepthSchedule | None, bool],
) -> None:
    assert choose(losses, scheduled, worth) == expected


# ---- who may follow one, and what it is worth ----


def plans(
    request: Request,
    *,
    schedules: dict[str, float | None],
    objective: str = "quality",
    **asked: Any,
) -> dict[str, float]:
    newcomer = Newcomer(
        num_prompt_tokens=4,
        num_output_tokens=request.sampling.max_tokens,
        arrival_s=0.0,
        deadlines=request.budget.deadlines(0.0),
        floor_layer=2,
    )
    worth = OBJECTIVES[objective].worth(make_exits(2, 4, 6, scores=SCORES, schedules=schedules))
    load = Load(now=0.0, policy=get_policy("deadline"), worth=worth.tokens)
    outlook = Outlook(load, MODEL, (2, 4, 6))

    def predict(exit_layer: int, newcomer: Newcomer, *, limit: float) -> Forecast:
        return forecast(exit_layer, newcomer, outlook, limit=limit)

    given = {"starts": (2, 4, 6), "allowed": (2, 4, 6), "weight": 1.0, **asked}
    found = scheduled_plans(request, newcomer, worth=worth, predict=predict, **given)
    return {str(plan.schedule): plan.worth for plan in found}


def test_an_answer_is_worth_the_mean_of_its_tokens_and_at_most_what_was_measured() -> None:
    request = timed_request("r", max_tokens=50, latency_ms=1000)

    def worth(measured: float) -> float:
        return plans(request, schedules={FALLING: measured})[FALLING]

    mean = (9 * 1.0 + 40 * 0.3) / 49
    assert worth(1.0) == pytest.approx(mean)
    assert worth(0.2) == pytest.approx(0.2)
    assert plans(request, schedules={FALLING: 0.2}, weight=3.0) == {FALLING: pytest.approx(0.6)}


def test_where_answers_in_time_count_a_schedule_is_worth_next_to_as_much_as_an_exit() -> None:
    request = timed_request("r", max_tokens=50, latency_ms=1000)

    found = plans(request, schedules={FALLING: 0.2}, objective="attainment")

    assert found == {FALLING: pytest.approx(1.0, abs=1e-5)}
    assert found[FALLING] < 1.0


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"min_quality": 0.1},
        {"exit_layer": 6, "latency_ms": 1000},
        {"schedule": [[0, 6], [3, 4]], "latency_ms": 1000},
    ],
)
def test_depth_that_was_not_left_to_the_server_follows_no_schedule_of_its_choice(
    budget: dict[str, Any],
) -> None:
    request = timed_request("r", max_tokens=50, **budget)

    assert plans(request, schedules={FALLING: 0.8}) == {}


@pytest.mark.parametrize(
    ("schedules", "asked"),
    [
        (
            {"0:6,49:2": 0.8},
            {},
        ),  # an answer of 49 tokens would never fall
        ({FALLING: None}, {}),
        ({"0:6": 0.8}, {}),
        ({FALLING: 0.8}, {"allowed": (4, 6), "starts": (4, 6)}),
        ({FALLING: 0.8}, {"starts": (4,)}),
    ],
)
def test_a_schedule_must_be_measured_and_stay_within_what_is_allowed(
    schedules: dict[str, float | None], asked: dict[str, Any]
) -> None:
    request = timed_request("r", max_tokens=49, latency_ms=1000)

    assert plans(request, schedules=schedules, **asked) == {}


def test_what_the_model_says_of_a_prompt_it_says_at_one_exit() -> None:
    plain = timed_request("r", max_tokens=50, latency_ms=1000)
    asked = replace(plain, prompt_logprobs=PromptLogprobs((1, 2, 3, 4), 1))

    assert plans(plain, schedules={FALLING: 0.8})
    assert plans(asked, schedules={FALLING: 0.8}) == {}


# ---- through the engine ----


def served(*, schedules: dict[str, float | None], **budget: Any) -> Timed:
    timed = make_timed(scores=SCORES, schedules=schedules, rule=depth_letter, min_quality=0.0)
    timed.run([timed_request("r", 100, max_tokens=50, **budget)])
    return timed


def whole_ms(schedule: str = "0:6") -> float:
    """Predicted time of an answer of 50 tokens under a schedule, alone."""
    newcomer = Newcomer(
        num_prompt_tokens=100,
        num_output_tokens=50,
        arrival_s=0.0,
        schedule=DepthSchedule.parse(schedule),
    )
    outlook = Outlook(Load(now=0.0, policy=get_policy("deadline")), MODEL, (2, 4, 6))
    return 1e3 * forecast(6, newcomer, outlook).estimate.e2e_s


def test_a_time_too_short_for_the_deepest_exit_is_kept_on_a_schedule_worth_more_than_the_next() -> (
    None
):
    # Exit 4 throughout is worth 0.7.
    steep, gentle = "0:6,10:2", "0:6,35:2"
    latency_ms = 1.15 * whole_ms(gentle)
    assert latency_ms < whole_ms()

    without = served(schedules={}, latency_ms=latency_ms)
    timed = served(schedules={steep: 0.9, gentle: 0.9}, latency_ms=latency_ms)

    assert without.reports["r"].tokens_by_exit == {4: 50}
    report = timed.reports["r"]
    assert report.met is True
    assert report.tokens_by_exit == {6: 35, 2: 15}
    assert report.degraded
    assert timed.choices["r"].schedule == DepthSchedule.parse(gentle)
    assert [change.reason for change in report.exit_changes] == ["schedule"]
    letters = timed.results["r"].text
    assert letters == served(schedules={}, schedule=[[0, 6], [35, 2]]).results["r"].text


@pytest.mark.parametrize("factor", [1.3, math.inf])
def test_with_time_enough_depth_is_not_given_away(factor: float) -> None:
    budget = {"latency_ms": factor * whole_ms()} if math.isfinite(factor) else {}

    timed = served(schedules={FALLING: 1.0}, **budget)

    assert timed.reports["r"].tokens_by_exit == {6: 50}
    assert not timed.reports["r"].degraded


def test_several_answers_of_one_request_are_each_reckoned_with_on_the_schedule() -> None:
    newcomer = Newcomer(
        num_prompt_tokens=100,
        num_output_tokens=50,
        arrival_s=0.0,
        deadlines=Deadlines(e2e_s=1.0),
        schedule=SCHEDULE,
        num_siblings=2,
    )
    outlook = Outlook(Load(now=0.0, policy=get_policy("deadline")), MODEL, (2, 4, 6))
    found = forecast(6, newcomer, outlook)

    others = siblings(6, newcomer, found, outlook)

    assert len({demand.request_id for demand in others}) == 2
    for demand in others:
        # The first tokens, the deepest, have longer gaps than the mean.
        assert demand.gap_s == pytest.approx(demand.next_share * found.promise.gap_s)
        assert demand.next_share > 1.5


def test_who_starts_where_all_of_its_kind_fit_may_still_follow_a_schedule_from_there() -> None:
    gentle = "0:6,35:2"
    timed = make_timed(scores=SCORES, schedules={gentle: 0.9}, min_quality=0.0)
    request = timed_request("r", 100, max_tokens=50, latency_ms=1.15 * whole_ms(gentle))
    allowed = timed.engine.validate(request)

    start = timed.desk.choose(request, allowed).exit_layer

    assert timed.desk.choose(request, allowed, exit_layer=start).schedule is not None
    assert timed.desk.choose(request, allowed, exit_layer=4).schedule is None
