"""Law 14: tokens that a grammar forces are the same in one chunk and one by one.

The model is scripted, and the grammar is a form to fill in (``support.scripted_grammar``), so a
lost place in it shows as a letter that does not belong there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.core.budget import Budget
from sortserve.scheduling.policies.table import POLICIES
from support.examples import examples
from support.launchers import LAUNCHERS
from support.scripted import (
    Collected,
    ScriptedRunner,
    add,
    collect,
    depth_letter,
    go_shallower,
    make_engine,
    make_request,
    run,
)
from support.scripted_grammar import Form

FORM = '{"name":"???","size":"?","kind":"??","place":"???","state":"?"}'
EXITS = (2, 4, 6)


def filled(form: str) -> re.Pattern[str]:
    return re.compile(re.escape(form).replace(r"\?", "[a-z]").replace(r"\*", "[a-z]*"))


def answer(form: str, exit_layer: int = 6, **sampling: Any) -> Collected:
    engine = make_engine(runner=ScriptedRunner(rule=depth_letter))
    add(
        engine, make_request("r", "abc", max_tokens=100, grammar=Form(form), **sampling), exit_layer
    )
    return run(engine)["r"]


FORMS = st.text(alphabet="?ab{:", min_size=1, max_size=24)


@given(
    forms=st.lists(st.tuples(FORMS, st.sampled_from(EXITS)), min_size=1, max_size=6),
    policy=st.sampled_from(sorted(POLICIES)),
    num_pages=st.sampled_from([48, 512]),
    chunk=st.sampled_from([5, 16, 256]),
    launcher=st.sampled_from([None, "early", "late"]),
)
@settings(max_examples=examples(80), deadline=None)
def test_forced_tokens_in_a_chunk_equal_one_by_one_in_any_batch(
    forms: list[tuple[str, int]], policy: str, num_pages: int, chunk: int, launcher: str | None
) -> None:
    runner = ScriptedRunner(num_pages=num_pages, rule=depth_letter)
    engine = make_engine(
        runner=runner if launcher is None else LAUNCHERS[launcher](runner),
        async_scheduling=launcher is not None,
        policy=policy,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
    )
    add(engine, make_request("free", "abc", max_tokens=30), 4)
    for i, (form, exit_layer) in enumerate(forms):
        request = make_request(str(i), "abc", max_tokens=100, grammar=Form(form))
        add(engine, request, exit_layer)

    results = run(engine)

    for i, (form, exit_layer) in enumerate(forms):
        one_by_one = answer(form, exit_layer, logprobs=0)
        assert results[str(i)].token_ids == one_by_one.token_ids
        assert results[str(i)].text == one_by_one.text
        assert filled(form).fullmatch(results[str(i)].text)
    assert engine.stats().kv_pages_used == 0


def num_steps(**sampling: Any) -> int:
    runner = ScriptedRunner()
    engine = make_engine(runner=runner)
    add(engine, make_request("r", "abc", max_tokens=100, grammar=Form(FORM), **sampling))
    assert filled(FORM).fullmatch(run(engine)["r"].text)
    return len(runner.plans)


def test_forced_tokens_cost_no_steps_of_their_own() -> None:
    num_free = FORM.count("?")

    assert num_steps(logprobs=0) == len(FORM)
    assert num_steps() == num_free + 1  # and the first, where the prompt is read


def test_a_preempted_answer_keeps_its_place_in_the_grammar() -> None:
    engine = make_engine(runner=ScriptedRunner(rule=depth_letter))
    add(engine, make_request("r", "abc", max_tokens=100, grammar=Form(FORM)))
    results: dict[str, Collected] = {}
    for _ in range(4):
        collect(engine.step(), results)
    [sequence] = engine.scheduler.sequences()

    engine.scheduler.preempt(sequence)
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()

    assert results["r"].token_ids == answer(FORM).token_ids


def test_an_answer_that_goes_shallower_keeps_its_place_and_tells_both_depths() -> None:
    engine = make_engine(runner=ScriptedRunner(rule=depth_letter))
    add(engine, make_request("r", "abc", max_tokens=100, grammar=Form(FORM)))
    results: dict[str, Collected] = {}
    for _ in range(4):
        collect(engine.step(), results)

    go_shallower(engine, "r", 2)
    while engine.has_work:
        collect(engine.step(), results)

    assert filled(FORM).fullmatch(results["r"].text)
    assert results["r"].last is not None
    assert results["r"].last.report is not None
    assert set(results["r"].last.report.tokens_by_exit) == {2, 6}


def test_a_schedule_takes_forced_tokens_at_their_own_exits() -> None:
    budget = Budget.from_mapping({"schedule": [[0, 6], [12, 4], [30, 2]]})
    assert budget.schedule is not None
    reports = []
    for logprobs in (None, 0):
        engine = make_engine(runner=ScriptedRunner(rule=depth_letter))
        request = make_request(
            "r", "abc", max_tokens=100, grammar=Form(FORM), budget=budget, logprobs=logprobs
        )
        add(engine, request, 6)
        result = run(engine)["r"]
        assert result.last is not None
        assert result.last.report is not None
        reports.append((result.token_ids, result.last.report.tokens_by_exit))
        assert not result.last.report.degraded

    assert reports[0] == reports[1]
    assert reports[0][1] == budget.schedule.tokens_by_exit(len(FORM))


def always_x(tokens: Sequence[int], exit_layer: int) -> int:
    return ord("x")


@pytest.mark.parametrize(
    ("form", "sampling", "text", "reason"),
    [
        ("[??]", {}, "[xx]", "stop"),  # without an end token: nothing can follow
        ("[??]", {"max_tokens": 3}, "[xx", "length"),
        ("[??]", {"max_tokens": 4}, "[xx]", "stop"),
        ("[??]", {"min_tokens": 50}, "[xx]", "stop"),
        ("[??]", {"ignore_eos": True}, "[xx]", "stop"),
        ("??----??", {"stop": ("---",)}, "xx", "stop"),
        ("??----??", {"stop_token_ids": (ord("-"),)}, "xx", "stop"),
        ("?*", {"max_tokens": 5}, "xxxxx", "length"),
    ],
)
@pytest.mark.parametrize("logprobs", [None, 0])
def test_how_an_answer_with_a_grammar_ends(
    form: str, sampling: dict[str, Any], text: str, reason: str, logprobs: int | None
) -> None:
    engine = make_engine(runner=ScriptedRunner(rule=always_x))
    fields = {"max_tokens": 100, "logprobs": logprobs, **sampling}
    add(engine, make_request("r", "a", grammar=Form(form), **fields))

    result = run(engine)["r"]

    assert result.text == text
    assert result.last is not None
    assert result.last.finish_reason == reason


def test_a_grammar_that_fails_ends_its_own_request_alone() -> None:
    engine = make_engine(runner=ScriptedRunner(rule=always_x))
    add(engine, make_request("bad", "a", max_tokens=9, grammar=Form("[?????]", fails_after=3)))
    add(engine, make_request("good", "a", max_tokens=9, grammar=Form("[?????]")))
    add(engine, make_request("free", "a", max_tokens=9))

    results = run(engine)

    assert results["good"].text == "[xxxxx]"
    assert results["free"].text == "x" * 9
    assert results["bad"].last is not None
    assert "grammar" in str(results["bad"].last.error)
    assert engine.stats().kv_pages_used == 0
