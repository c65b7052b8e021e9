"""Depth schedules: what may be said, what is refused by name, pages, times and promises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.admission.forecast import forecast
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.core.budget import Budget
from sortserve.core.errors import InvalidRequestError
from sortserve.core.schedule import MAX_PARTS, MAX_TOKEN, DepthSchedule, mean_over_tokens
from sortserve.engine.desk import desk_of
from sortserve.scheduling.policies.table import get_policy
from support.scripted import (
    ScriptedRunner,
    add,
    collect,
    depth_letter,
    make_engine,
    make_exits,
    make_request,
    run,
)
from support.timed import MODEL, make_demand, make_timed, timed_request

PAIRS = [[0, 30], [32, 15], [96, 9]]
EXITS = make_exits(9, 15, 30)

# ---- what may be said ----


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([], f"a list of 1 to {MAX_PARTS} pairs"),
        ([[i, 99 - i] for i in range(MAX_PARTS + 1)], f"a list of 1 to {MAX_PARTS} pairs"),
        ("0:30", f"a list of 1 to {MAX_PARTS} pairs"),
        ({"0": 30}, f"a list of 1 to {MAX_PARTS} pairs"),
        (30, f"a list of 1 to {MAX_PARTS} pairs"),
        ([30], r"its entry 0, 30, must be a pair \[k, E\] of integers from 0 to 2147483647"),
        ([[0, 30], [32]], r"its entry 1, \[32\], must be a pair"),
        ([[0, 30, 1]], "its entry 0"),
        ([[0, 30], ["32", 15]], "its entry 1"),
        ([[0, 30.0]], "its entry 0"),
        ([[0, True]], "its entry 0"),
        ([[-1, 30]], "its entry 0"),
        ([[0, 30], [MAX_TOKEN + 1, 15]], "its entry 1"),
        ([[1, 30]], "it must begin at output token 0, not at 1"),
        ([[0, 30], [32, 15], [32, 9]], "its tokens must ascend, but 32 follows 32"),
        ([[0, 30], [32, 30]], "its exits must descend, but 30 follows 30"),
        ([[0, 15], [32, 30]], "its exits must descend, but 30 follows 15"),
        ([[0, 0]], "0 is no exit"),
    ],
)
def test_a_bad_schedule_is_refused_with_its_value_and_what_is_allowed(
    pairs: object, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as error:
        Budget.from_mapping({"schedule": pairs})

    assert error.value.param == "budget.schedule"
    written = f"budget.schedule={pairs!r}".replace("True", "true")
    assert error.value.message.startswith(written[:100])
    assert error.value.message.endswith(".")
    assert not error.value.message.endswith("..")
    assert len(error.value.message) < 300


@pytest.mark.parametrize("other", ["compute", "min_exit_layer", "min_quality"])
def test_a_schedule_fixes_the_depth_so_nothing_else_may_choose_it(other: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"budget\.schedule=\[\[0, 30\], .* fixes"
    ) as error:
        Budget.from_mapping({"schedule": PAIRS, other: 1})

    assert error.value.param == f"budget.{other}"


def test_a_schedule_and_an_exit_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError, match=r"budget\.exit_layer=30 fixes") as error:
        Budget.from_mapping({"schedule": PAIRS, "exit_layer": 30})

    assert error.value.param == "budget.schedule"


def test_a_schedule_names_exits_of_the_checkpoint() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"names 20, which is not an exit .* \[9, 15, 30\]"
    ) as error:
        EXITS.allowed(Budget.from_mapping({"schedule": [[0, 30], [5, 20]]}))

    assert error.value.param == "budget.schedule"


def test_without_a_time_it_begins_at_its_first_exit_and_with_one_as_far_down_as_its_last() -> None:
    assert EXITS.allowed(Budget.from_mapping({"schedule": PAIRS})) == (30,)
    for pairs, allowed in ((PAIRS, (9, 15, 30)), ([[0, 30], [5, 15]], (15, 30))):
        assert EXITS.allowed(Budget.from_mapping({"schedule": pairs, "tpot_ms": 9})) == allowed
    assert Budget.from_mapping({"schedule": PAIRS, "latency_ms": 9}).kinds == (
        "latency_ms",
        "schedule",
    )


def test_a_schedule_is_written_as_it_is_read() -> None:
    schedule = DepthSchedule.parse("0:30, 32:15,96:9")

    assert schedule == Budget.from_mapping({"schedule": PAIRS}).schedule
    assert schedule.document == PAIRS
    assert str(schedule) == "0:30,32:15,96:9"
    assert schedule.exits == (9, 15, 30)


@pytest.mark.parametrize("text", ["", "30", "0:30,", "0:30;32:15", "a:b", "0:30,32:1e1", "0:-3"])
def test_what_is_no_schedule_on_a_command_line_is_told_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="should be K:E"):
        DepthSchedule.parse(text)


# ---- what it means ----

parts = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 40), min_size=n - 1, max_size=n - 1, unique=True).map(sorted),
        st.lists(st.integers(1, 50), min_size=n, max_size=n, unique=True),
    ).map(lambda p: tuple(zip([0, *p[0]], sorted(p[1], reverse=True), strict=True)))
)


@given(parts=parts, num_tokens=st.integers(0, 60), start=st.integers(0, 60), top=st.integers(1, 50))
def test_counts_and_means_are_those_of_its_tokens_one_by_one(
    parts: Any, num_tokens: int, start: int, top: int
) -> None:
    schedule = DepthSchedule(parts)
    each = [max((k, e) for k, e in parts if k <= i)[1] for i in range(num_tokens)]

    assert [schedule.exit_at(i) for i in range(num_tokens)] == each
    counts = schedule.tokens_by_exit(num_tokens, start)
    assert counts == {e: each[start:].count(e) for e in sorted(set(each[start:]), reverse=True)}
    capped = [min(e, top) for e in each[start:]] or [min(schedule.exit_at(start), top)]
    mean = mean_over_tokens(float, top, schedule, num_tokens, start)
    assert mean == pytest.approx(sum(capped) / len(capped))


def test_without_a_schedule_every_token_has_the_same_exit() -> None:
    assert mean_over_tokens(float, 15, None, 100) == 15


# ---- pages ----


def scheduled(request_id: str, prompt: str, pairs: Any, *, max_tokens: int, **budget: Any) -> Any:
    given = Budget.from_mapping({"schedule": pairs, **budget})
    return make_request(request_id, prompt, max_tokens=max_tokens, budget=given)


def test_the_deep_pages_are_free_as_soon_as_the_schedule_goes_shallower() -> None:
    runner = ScriptedRunner(rule=depth_letter)
    engine = make_engine(runner=runner, enable_prefix_caching=False)
    add(engine, scheduled("r", "abcdefgh", [[0, 6], [2, 4], [3, 2]], max_tokens=5))

    pages = []
    results: dict[str, Any] = {}
    while engine.has_work:
        collect(engine.step(), results)
        pages.append(engine.stats().kv_pages_used)
        engine.check_invariants()

    assert pages == [2 * 3, 3 * 3, 3 * 2, 3, 0]
    assert results["r"].exits == [6, 6, 4, 2, 2]
    changes = [change for plan in runner.plans for change in plan.exit_changes]
    assert changes == [(6, 4, "schedule"), (4, 2, "schedule")]


def test_a_request_that_ends_where_its_schedule_would_go_on_ends_at_the_exit_of_its_tokens() -> (
    None
):
    engine = make_engine()
    add(engine, scheduled("r", "a", [[0, 6], [3, 2]], max_tokens=3))

    last = run(engine)["r"].last

    assert last is not None
    assert last.report is not None
    assert last.report.exit_layer == 6
    assert last.report.tokens_by_exit == {6: 3}


@pytest.mark.parametrize(
    ("num_pages", "fits"),
    [
        (24, True),  # 8 + 24 tokens at exit 6 are 24 pages; 8 + 40 at exit 4 as many
        (23, False),
    ],
)
def test_its_greediest_moment_must_fit_the_cache_and_no_more(num_pages: int, fits: bool) -> None:
    engine = make_engine(runner=ScriptedRunner(num_pages=num_pages))
    request = scheduled("r", "a" * 8, [[0, 6], [24, 4], [40, 2]], max_tokens=80)

    if fits:
        assert engine.validate(request) == (6,)
        add(engine, request)
        assert len(run(engine)["r"].token_ids) == 80
    else:
        with pytest.raises(InvalidRequestError, match="needs 24 pages of KV cache at exit 6"):
            engine.validate(request)


def test_with_a_time_it_may_begin_at_the_deepest_of_its_exits_that_fits() -> None:
    engine = make_engine(runner=ScriptedRunner(num_pages=16))
    pairs = [[0, 6], [24, 4], [40, 2]]

    request = scheduled("r", "a" * 8, pairs, max_tokens=20, latency_ms=1e4)

    assert engine.validate(request) == (2, 4)


# ---- times ----


def newcomer(pairs: Any = None, **budget: float) -> Newcomer:
    return Newcomer(
        num_prompt_tokens=100,
        num_output_tokens=50,
        arrival_s=0.0,
        deadlines=Budget.from_mapping(budget).deadlines(0.0),
        floor_layer=2,
        schedule=None if pairs is None else DepthSchedule(pairs),
    )


def outlook(*demands: Any) -> Outlook:
    load = Load(now=0.0, demands=demands, policy=get_policy("deadline"))
    return Outlook(load, MODEL, (2, 4, 6))


@pytest.mark.parametrize("num_beside", [0, 3])
def test_its_prompt_is_read_at_the_first_exit_and_its_tokens_take_the_mean(num_beside: int) -> None:
    beside = outlook(*(make_demand(str(i), 4) for i in range(num_beside)))
    plain = {e: forecast(e, newcomer(), beside).estimate for e in (6, 4, 2)}

    found = forecast(6, newcomer([[0, 6], [20, 4], [30, 2]]), beside).estimate

    # The first of the 50 tokens comes with the prompt.
    tpot_s = (19 * plain[6].tpot_s + 10 * plain[4].tpot_s + 20 * plain[2].tpot_s) / 49
    assert found.ttft_s == pytest.approx(plain[6].ttft_s)
    assert found.tpot_s == pytest.approx(tpot_s)
    assert found.e2e_s == pytest.approx(found.ttft_s + 49 * tpot_s)


def test_a_time_that_the_first_exit_would_miss_is_promised_where_the_mean_keeps_it() -> None:
    whole_s = forecast(6, newcomer(), outlook()).estimate.e2e_s
    bound = {"latency_ms": 0.85 * 1e3 * whole_s}

    assert forecast(6, newcomer(**bound), outlook()).loss is None
    assert forecast(6, newcomer([[0, 6], [5, 2]], **bound), outlook()).loss == 0.0


def test_a_promise_is_kept_on_the_schedule_and_nobody_is_taken_down_before_its_token() -> None:
    pairs = [[0, 6], [10, 2]]
    whole_ms = 1e3 * forecast(6, newcomer(pairs), outlook()).estimate.e2e_s
    timed = make_timed()

    request = timed_request("r", 100, max_tokens=50, schedule=pairs, latency_ms=1.15 * whole_ms)
    timed.run([request])

    report = timed.reports["r"]
    assert timed.choices["r"].promise is not None
    assert report.met is True
    assert report.tokens_by_exit == {6: 10, 2: 40}


@pytest.mark.parametrize(("budget", "floors"), [({}, {6, 4}), ({"latency_ms": 5000}, {2})])
def test_only_a_time_lets_a_policy_take_it_down_before_its_token(
    budget: dict[str, Any], floors: set[int]
) -> None:
    engine = make_engine()
    engine.costs.use(MODEL)
    pairs = [[0, 6], [3, 4], [20, 2]]
    request = scheduled("r", "abcd", pairs, max_tokens=8, **budget)
    engine.add_request(request, desk_of(engine).choose(request, engine.validate(request)))

    seen = set()
    while engine.has_work:
        engine.step()
        seen |= {demand.floor_layer for demand in engine.demands()}

    assert seen == floors


def test_a_schedule_that_cannot_be_in_time_begins_shallower_and_goes_no_deeper() -> None:
    timed = make_timed()

    timed.run([timed_request("r", 4, max_tokens=20, schedule=[[0, 6], [10, 2]], tpot_ms=5.2)])

    report = timed.reports["r"]
    assert report.met is True
    assert report.tokens_by_exit == {4: 10, 2: 10}
