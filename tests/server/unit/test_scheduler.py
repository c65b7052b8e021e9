"""What the scheduler proposes, seen through the plans that a scripted model receives."""

from __future__ import annotations

import pytest

from sortserve.core.budget import Budget
from sortserve.core.errors import InvalidRequestError
from support.scripted import FakeClock, ScriptedRunner, add, make_engine, make_request, run


def test_rows_of_a_plan_go_deepest_first() -> None:
    runner = ScriptedRunner()
    engine = make_engine(runner=runner)
    for i, exit_layer in enumerate((2, 6, 4, 6, 2)):
        add(engine, make_request(f"r{i}"), exit_layer)

    engine.step()

    assert [row.exit_layer for row in runner.plans[0].rows] == [6, 6, 4, 2, 2]


def test_a_long_prompt_is_chunked_under_the_token_budget() -> None:
    runner = ScriptedRunner()
    engine = make_engine(runner=runner, max_num_batched_tokens=16)
    add(engine, make_request("long", "a" * 40, max_tokens=1))

    run(engine)

    assert [[row.num_tokens for row in plan.rows] for plan in runner.plans] == [[16], [16], [8]]
    assert [plan.rows[0].sampling is not None for plan in runner.plans] == [False, False, True]


def test_decoding_rows_come_before_prompt_chunks() -> None:
    runner = ScriptedRunner()
    engine = make_engine(runner=runner, max_num_batched_tokens=8)
    add(engine, make_request("decoding", "a", max_tokens=8))
    engine.step()
    add(engine, make_request("prompt", "b" * 20, max_tokens=1))

    engine.step()

    tokens = {row.request_id: row.num_tokens for row in runner.plans[-1].rows}
    assert tokens == {"decoding": 1, "prompt": 7}


def test_a_shallow_row_gets_more_steps_than_a_deep_one_under_fair() -> None:
    runner = ScriptedRunner()
    engine = make_engine(runner=runner, policy="fair", exits=(2, 20))
    add(engine, make_request("shallow", max_tokens=30), 2)
    add(engine, make_request("deep", max_tokens=30), 20)

    for _ in range(24):
        engine.step()

    served = [[row.request_id for row in plan.rows] for plan in runner.plans]
    deep = sum("deep" in rows for rows in served)
    shallow = sum("shallow" in rows for rows in served)
    assert shallow == 24
    assert deep == pytest.approx(24 * 4 / 22, abs=1)  # costs are (2 + 2) and (20 + 2)


def test_under_lockstep_every_row_runs_every_step() -> None:
    runner = ScriptedRunner()
    engine = make_engine(runner=runner, policy="lockstep")
    add(engine, make_request("shallow", max_tokens=5), 2)
    add(engine, make_request("deep", max_tokens=5), 6)

    run(engine)

    assert [len(plan.rows) for plan in runner.plans] == [2] * 5


def test_the_last_admitted_is_preempted_first_and_nothing_is_lost() -> None:
    runner = ScriptedRunner(num_pages=3 * 5, block_size=4)
    engine = make_engine(runner=runner, enable_prefix_caching=False)
    add(engine, make_request("first", "abcd", max_tokens=12), 6)
    add(engine, make_request("second", "abcd", max_tokens=12), 6)

    results = run(engine)

    assert results["first"].text == results["second"].text == "efghijklmnop"
    reports = {id_: result.last.report for id_, result in results.items() if result.last}
    assert reports["first"] is not None
    assert reports["first"].num_preemptions == 0
    assert reports["second"] is not None
    assert reports["second"].num_preemptions > 0


def test_admission_is_first_come_first_served() -> None:
    runner = ScriptedRunner(num_pages=16, block_size=4)
    engine = make_engine(runner=runner, enable_prefix_caching=False)
    add(engine, make_request("big", "a" * 12, max_tokens=2), 6)  # 9 of 16 pages, then 12
    add(engine, make_request("also big", "b" * 12, max_tokens=2), 6)
    add(engine, make_request("small", "c", max_tokens=2), 2)

    run(engine)

    # The small one has room beside the big one, and waits all the same for the one before it.
    rows = [[row.request_id for row in plan.rows] for plan in runner.plans]
    assert rows == [["big"], ["big"], ["also big", "small"], ["small"], ["also big"]]


def test_pages_are_exactly_proportional_to_depth() -> None:
    runner = ScriptedRunner()
    used = {}
    for exit_layer in (2, 4, 6):
        engine = make_engine(runner=runner)
        add(engine, make_request("r", "a" * 30, max_tokens=4), exit_layer)
        engine.step()
        used[exit_layer] = engine.stats().kv_pages_used

    assert used == {2: 8, 4: 16, 6: 24}


def test_a_request_that_can_never_fit_the_cache_is_refused() -> None:
    engine = make_engine(runner=ScriptedRunner(num_pages=6, block_size=4))

    with pytest.raises(InvalidRequestError, match="pages") as error:
        engine.validate(make_request("r", "a" * 10, max_tokens=100, budget=Budget(exit_layer=6)))
    assert error.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"),
    [("", 1, "prompt"), ("a" * 256, 1, "prompt"), ("a" * 200, 57, "max_tokens")],
)
def test_lengths_over_the_context_are_refused_by_field(
    prompt: str, max_tokens: int, param: str
) -> None:
    engine = make_engine()

    with pytest.raises(InvalidRequestError) as error:
        engine.validate(make_request("r", prompt, max_tokens=max_tokens))
    assert error.value.param == param


def test_a_failing_step_ends_its_requests_and_no_others() -> None:
    runner = ScriptedRunner()
    engine = make_engine(runner=runner, max_num_seqs=1)
    add(engine, make_request("lost"))
    add(engine, make_request("kept"))
    runner.fail_next = True

    results = run(engine)

    assert results["lost"].last is not None
    assert results["lost"].last.error is not None
    assert results["kept"].text == "bcde"


def test_a_truncated_request_stops_at_its_deadline_with_what_there_is() -> None:
    clock = FakeClock(tick=0.004)
    engine = make_engine(clock=clock)
    budget = Budget(latency_ms=100, on_miss="truncate")  # type: ignore[arg-type]
    add(engine, make_request("r", max_tokens=200, budget=budget))

    results = run(engine)

    last = results["r"].last
    assert last is not None
    assert last.finish_reason == "deadline"
    assert last.report is not None
    assert last.report.outcome == "truncated"
    assert last.report.met is True
    assert 0 < len(results["r"].token_ids) < 200


def test_a_reject_request_that_expires_in_the_queue_never_runs() -> None:
    clock = FakeClock()
    runner = ScriptedRunner()
    engine = make_engine(clock=clock, runner=runner, max_num_seqs=1)
    add(engine, make_request("busy", max_tokens=50))
    budget = Budget(ttft_ms=10, on_miss="reject")  # type: ignore[arg-type]
    add(engine, make_request("late", budget=budget, arrival_s=clock.now))
    clock.now += 1.0

    results = run(engine)

    assert results["late"].last is not None
    assert results["late"].last.error is not None
    assert results["late"].last.error.status == 429
    assert all(row.request_id != "late" for plan in runner.plans for row in plan.rows)
