"""The policy `deadline`, as pure functions of plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest

from sortserve.core.budget import Budget, Deadlines
from sortserve.core.sequence import Promise
from sortserve.scheduling.capacity import pressure
from sortserve.scheduling.demand import (
    SOFT_GAP_S,
    Demand,
    StepCosts,
    end_of,
    plan_pace,
    targets_of,
)
from sortserve.scheduling.policies.deadline import (
    MIN_CHUNK,
    deadline,
    least_slack_first,
    most_slack_last_admitted,
)
from sortserve.scheduling.policy import MOST_STEPS, DepthClass, Situation, StepChoice
from support.scripted import EOS, make_request, next_letter
from support.timed import COSTS, make_demand, make_timed, timed_request

EXITS = (2, 4, 6)
DEEP_S = COSTS.decode_s(6, 10)
SHALLOW_S = COSTS.decode_s(2, 10)


def choose(
    *rows: Demand,
    max_num_tokens: int = 1024,
    service: dict[int, float] | None = None,
    costs: StepCosts = COSTS,
) -> StepChoice:
    served = service or {}
    layers = sorted({row.exit_layer for row in rows}, reverse=True)
    classes = [DepthClass(e, 1, float(e), served.get(e, 0.0)) for e in layers]
    return deadline(Situation(0.0, rows, classes, costs, max_num_tokens))


# ---- the depth cap ----


def test_with_time_for_all_everybody_runs_as_deep_as_the_deepest() -> None:
    choice = choose(make_demand("deep", 6, due_s=0.1), make_demand("shallow", 2, due_s=0.1))

    assert choice.cap == 6
    assert set(choice.request_ids) == {"deep", "shallow"}


def test_a_shallow_row_that_a_deep_step_would_make_late_runs_alone() -> None:
    choice = choose(
        make_demand("deep", 6, due_s=0.1), make_demand("shallow", 2, due_s=1.5 * SHALLOW_S)
    )

    assert (choice.cap, choice.request_ids) == (2, ("shallow",))


def test_a_deep_row_that_cannot_wait_for_a_shallow_step_sets_the_cap() -> None:
    choice = choose(
        make_demand("deep", 6, due_s=1.2 * DEEP_S), make_demand("shallow", 2, due_s=0.1)
    )

    assert choice.cap == 6


def test_where_no_step_keeps_all_the_least_slack_goes_first() -> None:
    deep, shallow = make_demand("deep", 6, due_s=1.1 * DEEP_S), make_demand("shallow", 2)
    hurried = make_demand("hurried", 2, due_s=1.1 * SHALLOW_S)

    choice = choose(deep, shallow, hurried)

    assert (choice.cap, choice.request_ids) == (2, ("hurried",))  # slack 0.3 ms against 0.7 ms


def test_a_row_that_is_late_rides_in_every_step_that_reaches_it() -> None:
    choice = choose(make_demand("late", 4, due_s=-0.01), make_demand("deep", 6, due_s=0.1))

    assert (choice.cap, choice.request_ids) == (6, ("late", "deep"))


def test_rows_with_time_are_held_back_where_they_would_make_others_late() -> None:
    room_s = COSTS.base_s(2) + 3.5 * COSTS.row_s(2, 10)
    rows = [make_demand(f"r{i}", 2, due_s=0.5) for i in range(6)]

    choice = choose(make_demand("tight", 2, due_s=room_s), *rows)

    assert choice.request_ids == ("tight", "r0", "r1")


def test_beside_soft_rows_the_depths_share_what_the_promises_leave() -> None:
    rows = (make_demand("deep", 6), make_demand("shallow", 2), make_demand("kept", 6, due_s=0.1))

    assert choose(*rows, service={6: 5.0, 2: 0.0}).cap == 2
    assert choose(*rows, service={6: 0.0, 2: 5.0}).cap == 6


def test_fairness_does_not_break_a_promise() -> None:
    rows = (make_demand("soft", 2), make_demand("kept", 6, due_s=1.2 * DEEP_S, num_left=1))

    assert choose(*rows, service={6: 5.0, 2: 0.0}).cap == 6


def test_fairness_may_use_what_an_answer_as_a_whole_can_spare() -> None:
    rows = (make_demand("soft", 2), make_demand("kept", 6, due_s=1.2 * DEEP_S, num_left=20))

    assert choose(*rows, service={6: 5.0, 2: 0.0}).cap == 2


def test_a_soft_row_that_was_left_out_for_long_is_as_urgent_as_a_promise() -> None:
    starved = dataclasses.replace(make_demand("starved", 6), due_s=-1.0)
    tight = [make_demand(f"tight{i}", 2, due_s=1.5 * SHALLOW_S) for i in range(3)]

    choice = choose(starved, *tight)

    assert choice.cap == 6
    assert choice.request_ids == ("tight0", "tight1", "tight2", "starved")


# ---- prompts ----


def test_a_prompt_gets_as_many_tokens_as_the_least_slack_allows() -> None:
    token_s = COSTS.token_s(6, 150)
    decoding = make_demand("decoding", 6, due_s=DEEP_S + 100.5 * token_s, num_left=1)
    prompt = make_demand("prompt", 6, due_s=5.0, num_pending=300)

    choice = choose(decoding, prompt)

    assert choice.num_prompt_tokens == 100
    assert choice.request_ids == ("decoding", "prompt")


def test_tokens_that_are_scored_take_the_time_of_the_head_as_well() -> None:
    prompt = dataclasses.replace(
        make_demand("prompt", 6, due_s=5.0, num_pending=300), num_scored=299
    )
    token_s = COSTS.token_s(6, 150) + COSTS.row_line[0]
    decoding = make_demand("decoding", 6, due_s=DEEP_S + 100.5 * token_s, num_left=1)

    assert choose(decoding, prompt).num_prompt_tokens == 100


def test_a_prompt_gets_what_the_answers_beside_it_can_spare_as_a_whole() -> None:
    """Each token could wait for 20 tokens of the prompt, which is too few to begin with."""
    token_s = COSTS.token_s(6, 150)
    assert MIN_CHUNK > 20
    decoding = make_demand("decoding", 6, due_s=DEEP_S + 20 * token_s, num_left=10)
    prompt = make_demand("prompt", 6, due_s=5.0, num_pending=300)

    choice = choose(decoding, prompt)

    assert choice.request_ids == ("decoding", "prompt")
    assert choice.num_prompt_tokens == pytest.approx(200, abs=1)


def test_a_prompt_makes_a_step_of_rows_only_so_much_longer() -> None:
    """Who comes in the middle of a step waits for its end."""
    decoding = make_demand("decoding", 6, due_s=0.5, num_left=10)
    prompt = make_demand("prompt", 6, due_s=5.0, num_pending=900)

    choice = choose(decoding, prompt)

    most_s = MOST_STEPS * COSTS.decode_s(6, 10)
    assert choice.num_prompt_tokens == pytest.approx(most_s / COSTS.token_s(6, 450), abs=2)
    assert choose(prompt).num_prompt_tokens == 1024, "nobody runs who would wait"


def test_what_answers_can_spare_is_spent_with_the_safety_factor() -> None:
    """An error of one long step is not made good by the next, as that of a pace is."""
    token_s = COSTS.token_s(6, 150)
    decoding = make_demand("decoding", 6, due_s=1.5 * DEEP_S + 150.5 * token_s, num_left=1)
    prompt = make_demand("prompt", 6, due_s=5.0, num_pending=300)
    unsure = dataclasses.replace(COSTS, model=dataclasses.replace(COSTS.model, safety=1.5))

    choice = choose(decoding, prompt, costs=unsure)

    assert choice.num_prompt_tokens == pytest.approx(100, abs=1)


def test_what_a_large_step_costs_more_is_kept_from_prompts() -> None:
    c0, a, b, d, h = COSTS.model.large
    line = (c0 + 50 * COSTS.token_s(6, 150), a, b, d, h)
    later = dataclasses.replace(COSTS.model, large=line)
    decoding = make_demand("decoding", 6, due_s=DEEP_S + 100.5 * COSTS.token_s(6, 150), num_left=1)
    prompt = make_demand("prompt", 6, due_s=5.0, num_pending=300)

    choice = choose(decoding, prompt, costs=dataclasses.replace(COSTS, model=later))

    assert choice.num_prompt_tokens == 50


def test_a_prompt_without_haste_waits_where_there_is_no_room() -> None:
    decoding = make_demand("decoding", 6, due_s=1.01 * DEEP_S)
    prompt = make_demand("prompt", 6, due_s=5.0, num_pending=300)

    assert choose(decoding, prompt).request_ids == ("decoding",)


def test_a_prompt_that_is_due_gets_on_beside_rows_that_are() -> None:
    decoding = make_demand("decoding", 6, due_s=1.01 * DEEP_S)
    prompt = make_demand("prompt", 6, due_s=0.001, num_pending=300)

    choice = choose(decoding, prompt)

    assert choice.request_ids == ("decoding", "prompt")
    half = int(DEEP_S / COSTS.token_s(6, 150))
    assert choice.num_prompt_tokens == half > MIN_CHUNK


def test_an_urgent_prompt_is_left_a_token_where_those_who_are_due_fill_the_step() -> None:
    """They may lose their pages before the step is made, and it must not be empty then."""
    hurried = make_demand("hurried", 2, due_s=1.1 * SHALLOW_S, num_left=1)
    prompt = make_demand("prompt", 6, due_s=0.001, num_pending=300)

    choice = choose(hurried, prompt, max_num_tokens=1)

    assert choice == StepChoice(6, ("hurried", "prompt"), 1)


def test_a_soft_prompt_is_due_for_a_step_and_not_for_its_end() -> None:
    """One that takes longer to read than soft requests wait for a step is not always urgent."""
    decoding = make_demand("decoding", 6, due_s=1.01 * DEEP_S)
    soft = dataclasses.replace(make_demand("soft", 6, num_pending=6000), due_s=1.0)
    waited = dataclasses.replace(soft, due_s=DEEP_S)
    assert soft.work_s(COSTS) > 1.0

    assert choose(decoding, soft).request_ids == ("decoding",)
    assert choose(decoding, waited).request_ids == ("decoding", "soft")


def test_of_soft_prompts_the_one_that_is_due_gets_the_tokens_of_its_step() -> None:
    """Else the one before it would, and it would be due in each step."""
    decoding = make_demand("decoding", 6, due_s=1.01 * DEEP_S)
    first = dataclasses.replace(make_demand("first", 6, num_pending=900), due_s=2.0)
    second = dataclasses.replace(first, request_id="second", order=1.0, due_s=DEEP_S)

    choice = choose(decoding, first, second)

    assert choice.request_ids == ("decoding", "second")
    assert choice.num_prompt_tokens >= MIN_CHUNK


def test_steps_of_few_tokens_are_no_reason_to_leave_prompts_out() -> None:
    soft = make_demand("soft", 6, num_pending=300)

    assert choose(make_demand("row", 6), soft, max_num_tokens=9).num_prompt_tokens == 8
    kept = make_demand("kept", 6, due_s=2 * DEEP_S)
    assert choose(kept, soft, max_num_tokens=9).num_prompt_tokens == 8


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "latency_ms"), [([6000], 60, 700), ([3000] * 6, 600, 6000)]
)
def test_long_prompts_without_promises_break_none(
    prompts: list[int], max_tokens: int, latency_ms: float
) -> None:
    timed = make_timed(num_pages=20_000, max_model_len=8192)
    kept = timed_request("kept", 20, max_tokens=max_tokens, latency_ms=latency_ms, exit_layer=6)
    long = [
        timed_request(f"long {i}", length, max_tokens=4, at=0.05 + 1e-3 * i, exit_layer=6)
        for i, length in enumerate(prompts)
    ]

    timed.run([kept, *long])

    assert timed.choices["kept"].fits
    assert timed.reports["kept"].met
    assert len(timed.reports) == 1 + len(prompts)


@pytest.mark.parametrize("budget", [{}, {"latency_ms": 2500}])
def test_a_pace_is_kept_whenever_its_answer_ends(budget: dict[str, Any]) -> None:
    """It was planned for 200 tokens, and ends after 11: a prompt may take what those have saved."""

    def ends_soon(tokens: Sequence[int], exit_layer: int) -> int:
        return EOS if 30 <= len(tokens) < 60 else next_letter(tokens, exit_layer)

    timed = make_timed(num_pages=6000, max_model_len=8192, rule=ends_soon)
    paced = make_request(
        "paced", "a" * 20, max_tokens=200, arrival_s=0.0, budget=Budget(tpot_ms=20, exit_layer=6)
    )

    timed.run([paced, timed_request("long", 3000, at=0.06, exit_layer=6, **budget)])

    assert timed.choices["paced"].fits
    assert timed.reports["paced"].num_output_tokens == 11
    assert timed.reports["paced"].met
    assert timed.reports["long"].e2e_s < 1.0


def test_alone_a_prompt_fills_the_step() -> None:
    choice = choose(make_demand("prompt", 6, due_s=5.0, num_pending=3000), max_num_tokens=512)

    assert choice.num_prompt_tokens == 512


def test_prompts_get_tokens_in_the_order_in_which_they_are_due() -> None:
    late, soon = (
        make_demand("late", 6, due_s=5.0, num_pending=300),
        make_demand("soon", 6, due_s=1.0, num_pending=300, order=1.0),
    )
    soft = make_demand("soft", 6, num_pending=300)

    assert choose(soft, late, soon).request_ids == ("soon", "late", "soft")


def test_an_answer_that_grows_while_it_waits_should_be_over_no_later() -> None:
    """Lengths are learned meanwhile, and it may be planned for more tokens than it was."""
    targets = Deadlines(e2e_s=2.0)
    pace = plan_pace(targets, now=0.0, num_tokens=10, prefill_s=0.1, decode_s=0.01)
    promise = Promise(targets, pace.first_due_s, pace.gap_s)

    assert end_of(promise, 0.0, 10) == pytest.approx(2.0)
    assert end_of(promise, 0.0, 100) == 2.0


@pytest.mark.parametrize(
    ("deadlines", "num_tokens", "end_s"),
    [
        (Deadlines(ttft_s=1.0), 10, math.inf),
        (Deadlines(ttft_s=1.0), 1, 1.0),
        (Deadlines(tpot_s=0.1), 11, 1.5),
        (Deadlines(tpot_s=0.1), 1, math.inf),
        (Deadlines(ttft_s=1.0, tpot_s=0.1), 11, 1.5),
        (Deadlines(tpot_s=0.5, e2e_s=2.0), 11, 2.0),
    ],
)
def test_an_answer_without_a_token_is_over_when_its_budget_says(
    deadlines: Deadlines, num_tokens: int, end_s: float
) -> None:
    """Half a second has gone by; a pace counts from a token that may come now."""
    pace = plan_pace(deadlines, now=0.0, num_tokens=num_tokens, prefill_s=0.1, decode_s=0.01)
    promise = Promise(deadlines, pace.first_due_s, pace.gap_s)

    assert end_of(promise, 0.5, num_tokens) == pytest.approx(end_s)


# ---- who enters, who leaves ----


def test_the_least_slack_enters_first_and_equals_by_arrival() -> None:
    waiting = [
        make_demand("soft", num_pending=50),
        make_demand("loose", due_s=9.0, num_pending=50),
        make_demand("second", due_s=1.0, num_pending=50, order=2.0),
        make_demand("first", due_s=1.0, num_pending=50, order=1.0),
    ]

    ordered = [demand.request_id for demand in least_slack_first(waiting, COSTS)]

    assert ordered == ["first", "second", "loose", "soft"]


@pytest.mark.parametrize(
    ("waited_s", "first"), [(SOFT_GAP_S / 2, "promised"), (SOFT_GAP_S, "soft")]
)
def test_once_a_second_the_oldest_without_a_promise_enters_first(
    waited_s: float, first: str
) -> None:
    timed = make_timed(max_num_seqs=1)
    timed.arrive(timed_request("before", max_tokens=1))
    timed.step()
    timed.clock.now = waited_s
    for name, budget in (("younger", {}), ("promised", {"latency_ms": 9000})):
        timed.arrive(timed_request(name, max_tokens=1, at=0.2, **budget))
    timed.arrive(timed_request("soft", max_tokens=1, at=0.1))

    timed.step()

    assert list(timed.reports) == ["before", first]


@pytest.mark.parametrize("kind", [{}, {"tpot_ms": 500}, {"latency_ms": 900}])
def test_only_one_without_a_due_time_goes_before_the_promises_in_a_second(
    kind: dict[str, float],
) -> None:
    """Whether nothing was promised, or a pace alone, or the promise is lost."""
    timed = make_timed(max_num_seqs=1)
    timed.clock.now = 2 * SOFT_GAP_S
    for i in range(3):
        timed.arrive(timed_request(f"{i}", 4, max_tokens=1, at=1.9 + 0.01 * i, **kind))
    timed.arrive(timed_request("due", max_tokens=1, at=2.0, latency_ms=9000))
    timed.clock.now += 1.0

    timed.run()

    assert list(timed.reports) == ["0", "due", "1", "2"]


def test_those_whose_promises_are_lost_share_the_steps_of_soft_requests() -> None:
    timed = make_timed()
    for i in range(3):
        timed.arrive(timed_request(f"{i}", max_tokens=30, latency_ms=900))
    timed.arrive(timed_request("plain", max_tokens=30))
    timed.step()
    timed.clock.now += 10.0  # the machine stood still

    gaps_s = []
    for _ in range(3):
        timed.step()
        gaps_s.append({demand.gap_s for demand in timed.engine.demands()})

    assert gaps_s[-1] == {4 * SOFT_GAP_S}


def test_soft_requests_lose_their_pages_first_then_the_promise_with_most_time() -> None:
    kept, loose = make_demand("kept", due_s=1.0), make_demand("loose", due_s=9.0)

    assert most_slack_last_admitted([make_demand("a"), make_demand("b"), kept]) == "b"
    assert most_slack_last_admitted([kept, loose]) == "loose"


def test_of_soft_requests_those_of_more_weight_enter_first_and_are_preempted_last() -> None:
    def soft(name: str, weight: float, order: float) -> Demand:
        return dataclasses.replace(make_demand(name, order=order), weight=weight)

    rows = [soft("a", 1.0, 0), soft("b", 4.0, 1), soft("c", 1.0, 2), soft("d", 0.25, 3)]
    hard = make_demand("hard", due_s=5.0)

    ordered = [demand.request_id for demand in least_slack_first([*rows, hard], COSTS)]

    assert ordered == ["hard", "b", "a", "c", "d"]
    assert most_slack_last_admitted([*rows, hard]) == "d"
    assert most_slack_last_admitted([*rows[:3], hard]) == "c"
    assert most_slack_last_admitted([soft("e", 1e-3, -1), *rows[:3], hard]) == "c", "the oldest"
    assert most_slack_last_admitted([soft("e", 1e-3, -1), hard]) == "e"


def test_who_has_little_weight_gets_in_all_the_same() -> None:
    timed = make_timed(max_num_seqs=1)
    low = dataclasses.replace(timed_request("low", max_tokens=5, at=0.001), weight=1e-3)
    many = [
        dataclasses.replace(timed_request(f"m{i}", 40, max_tokens=30, at=0.01 * i), weight=1e3)
        for i in range(40)
    ]

    timed.run([*many, low])

    last = max(report.finished_s for report in timed.reports.values())
    assert timed.reports["low"].finished_s < last / 2


# ---- pace ----


def test_the_time_of_a_budget_is_spread_in_proportion() -> None:
    pace = plan_pace(Deadlines(e2e_s=12.0), now=2.0, num_tokens=5, prefill_s=1.0, decode_s=1.0)

    assert pace.first_due_s == pytest.approx(4.0)
    assert pace.gap_s == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("deadlines", "first_due_s", "gap_s"),
    [
        (Deadlines(), math.inf, math.inf),
        (Deadlines(ttft_s=3.0), 3.0, math.inf),
        (Deadlines(tpot_s=0.5), math.inf, 0.5),
        (Deadlines(ttft_s=3.0, e2e_s=12.0), 3.0, 9.0 / 4),
        (Deadlines(tpot_s=0.5, e2e_s=12.0), 10.0, 0.5),
        (Deadlines(tpot_s=0.5, ttft_s=3.0, e2e_s=12.0), 3.0, 0.5),
    ],
)
def test_each_kind_of_bound_has_its_pace(
    deadlines: Deadlines, first_due_s: float, gap_s: float
) -> None:
    pace = plan_pace(deadlines, now=2.0, num_tokens=5, prefill_s=1.0, decode_s=1.0)

    assert pace.first_due_s == pytest.approx(first_due_s)
    assert pace.gap_s == pytest.approx(gap_s)


def test_whatever_the_ease_the_pace_ends_at_the_deadline() -> None:
    for ease in (1.0, 0.6, 0.3):
        pace = plan_pace(
            Deadlines(e2e_s=12.0), now=2.0, num_tokens=5, prefill_s=1.0, decode_s=0.5, ease=ease
        )
        assert pace.first_due_s + 4 * pace.gap_s == pytest.approx(12.0)
        assert 2.0 < pace.first_due_s < 12.0


def test_times_are_paced_a_little_earlier_than_the_client_asked() -> None:
    targets = targets_of(Deadlines(ttft_s=11.0, e2e_s=20.0, tpot_s=0.1), arrival_s=10.0)

    assert targets.ttft_s is not None
    assert targets.e2e_s is not None
    assert targets.tpot_s is not None
    assert 10.9 < targets.ttft_s < 11.0
    assert 19.0 < targets.e2e_s < 20.0
    assert 0.09 < targets.tpot_s < 0.1


def test_the_step_that_ends_a_prompt_in_time_is_not_filled_up_with_others() -> None:
    token_s = COSTS.token_s(6, 10)
    due_s = COSTS.base_s(6) + 30 * token_s
    last_chunk = make_demand("last", 6, due_s=due_s, num_pending=10)
    later = make_demand("later", 6, num_pending=500)

    choice = choose(last_chunk, later)

    assert choice.request_ids == ("last", "later")
    assert 10 <= choice.num_prompt_tokens <= 30
    assert choose(later).num_prompt_tokens == 1024
    assert choose(make_demand("late", 6, due_s=-1.0, num_pending=10), later).num_prompt_tokens == 10


# ---- pressure, and going shallower ----


def load_of(demands: Sequence[Demand]) -> float:
    return pressure(demands, COSTS, now=0.0)


def test_one_row_needs_its_steps_share_of_the_time() -> None:
    assert load_of([make_demand(due_s=0.1, gap_s=2 * DEEP_S)]) == pytest.approx(0.5, abs=1e-3)


def test_a_step_is_paid_once_for_all_rows_that_it_reaches() -> None:
    deep = make_demand("deep", 6, due_s=0.1, gap_s=10 * DEEP_S)
    rider = make_demand("rider", 2, due_s=0.1, gap_s=10 * DEEP_S)
    often = make_demand("often", 2, due_s=0.1, gap_s=5 * DEEP_S)

    alone, with_rider, with_often = load_of([deep]), load_of([deep, rider]), load_of([deep, often])

    assert with_rider - alone == pytest.approx(COSTS.row_s(2, 11) / (10 * DEEP_S))
    assert with_often > with_rider


def test_a_prompt_must_fit_before_it_is_due_and_only_later_ones_wait_for_it() -> None:
    work_s = COSTS.prefill_s(6, 200)
    first = make_demand("first", due_s=2 * work_s, num_pending=200)
    second = make_demand("second", due_s=3 * work_s, num_pending=200, gap_s=100.0)

    assert load_of([first]) == pytest.approx(0.5, abs=0.02)
    assert 2 / 3 <= load_of([first, second]) < 0.85


def test_who_has_little_weight_gets_on_where_pages_are_short_all_the_time() -> None:
    timed = make_timed(num_pages=60, max_num_seqs=8)
    low = dataclasses.replace(timed_request("low", 20, max_tokens=30, at=0.05), weight=1e-3)
    many = [
        dataclasses.replace(timed_request(f"m{i}", 20, max_tokens=40, at=0.1 * i), weight=1e3)
        for i in range(60)
    ]

    timed.run([*many, low])

    last = max(report.finished_s for report in timed.reports.values())
    assert sum(plan.num_preemptions for plan in timed.runner.plans) > 0
    assert timed.reports["low"].finished_s < last / 2
