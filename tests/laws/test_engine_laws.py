"""Laws 4, 5, 7, 8 and 9 of the engine's bookkeeping, with a scripted model that checks every page.

The scripted runner remembers which token was written at each offset of each page of each slab, and
asserts on every read that what it reads is what the sequence wrote. So these tests find a wrong
page table whatever the network is.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.engine.engine import Engine
from sortserve.scheduling.policies.table import POLICIES
from support.examples import examples
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

EXITS = (2, 4, 6)


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Requests as (prompt, max_tokens, exit); prompts share prefixes often."""
    prompts = st.lists(st.sampled_from(["abcd", "abce", "zzzz", "q"]), min_size=1, max_size=6)
    return draw(
        st.lists(
            st.tuples(prompts.map("".join), st.integers(1, 20), st.sampled_from(EXITS)),
            min_size=1,
            max_size=12,
        )
    )


def alone(prompt: str, max_tokens: int, exit_layer: int) -> list[int]:
    """What the rule gives, without any engine."""
    tokens = list(map(ord, prompt))
    for _ in range(max_tokens):
        tokens.append(depth_letter(tokens, exit_layer))
    return tokens[len(prompt) :]


@given(
    workload=workloads(),
    policy=st.sampled_from(sorted(POLICIES)),
    num_pages=st.sampled_from([36, 48, 512]),
    chunk=st.sampled_from([5, 16, 256]),
    caching=st.booleans(),
    max_num_seqs=st.sampled_from([1, 3, 5]),
)
@settings(max_examples=examples(120), deadline=None)
def test_any_batch_under_any_pressure_equals_each_request_alone(
    workload: list[tuple[str, int, int]],
    policy: str,
    num_pages: int,
    chunk: int,
    caching: bool,
    max_num_seqs: int,
) -> None:
    engine = make_engine(
        runner=ScriptedRunner(num_pages=num_pages, rule=depth_letter),
        policy=policy,
        max_num_batched_tokens=chunk,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=caching,
    )
    for i, (prompt, max_tokens, exit_layer) in enumerate(workload):
        add(engine, make_request(str(i), prompt, max_tokens=max_tokens), exit_layer)

    results = run(engine)

    for i, request in enumerate(workload):
        assert results[str(i)].token_ids == alone(*request)
    assert engine.stats().kv_pages_used == 0


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("add"), st.sampled_from(EXITS)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("preempt"), st.integers(0, 20)),
        st.tuples(st.just("shallower"), st.integers(0, 20)),
    ),
    min_size=5,
    max_size=60,
)


@given(actions=ACTIONS, num_pages=st.sampled_from([30, 60, 200]), chunk=st.sampled_from([6, 64]))
@settings(max_examples=examples(150), deadline=None)
def test_no_page_leaks_and_everyone_finishes_after_any_storm(
    actions: list[tuple[str, int]], num_pages: int, chunk: int
) -> None:
    engine = make_engine(
        runner=ScriptedRunner(num_pages=num_pages, rule=depth_letter),
        max_num_batched_tokens=chunk,
        max_num_seqs=5,
    )
    results: dict[str, Collected] = {}
    ids: list[str] = []
    for name, value in actions:
        act(engine, name, value, ids, results)
        engine.check_invariants()

    for request_id, result in run(engine).items():
        results.setdefault(request_id, result).last = result.last
    assert set(results) == set(ids)
    assert all(r.last is not None and r.last.finish_reason is not None for r in results.values())
    assert engine.stats().kv_pages_used == 0


def act(
    engine: Engine, name: str, value: int, ids: list[str], results: dict[str, Collected]
) -> None:
    live = list(engine.scheduler.sequences())
    if name == "step":
        for _ in range(value):
            collect(engine.step(), results)
    elif name == "add":
        ids.append(str(len(ids)))
        prompt = "abcd" * (1 + len(ids) % 3)
        add(engine, make_request(ids[-1], prompt, max_tokens=1 + len(ids) % 9), value)
    elif name == "abort" and ids:
        output = engine.abort(ids[value % len(ids)])
        collect([output] if output is not None else [], results)
    elif name == "preempt" and live:
        sequence = live[value % len(live)]
        if sequence.num_computed_tokens:
            engine.scheduler.preempt(sequence)
    elif name == "shallower" and live:
        sequence = live[value % len(live)]
        if sequence.exit_layer > EXITS[0]:
            go_shallower(engine, sequence.request_id, EXITS[0])


@pytest.mark.parametrize(("donor", "taker", "hit"), [(6, 6, 8), (6, 2, 8), (2, 6, 0), (4, 4, 8)])
def test_a_prefix_serves_requests_as_deep_as_its_donor_or_shallower(
    donor: int, taker: int, hit: int
) -> None:
    engine = make_engine(runner=ScriptedRunner(rule=depth_letter))
    add(engine, make_request("donor", "abcdefghi", max_tokens=2), donor)
    run(engine)
    add(engine, make_request("taker", "abcdefghi", max_tokens=6), taker)

    results = run(engine)

    last = results["taker"].last
    assert last is not None
    assert last.report is not None
    assert last.report.num_cached_tokens == hit
    assert results["taker"].token_ids == alone("abcdefghi", 6, taker)


def test_prefixes_are_not_shared_across_salts() -> None:
    engine = make_engine()
    add(engine, make_request("a", "abcdefghi", cache_salt="one"))
    run(engine)
    add(engine, make_request("b", "abcdefghi", cache_salt="two"))

    last = run(engine)["b"].last

    assert last is not None
    assert last.report is not None
    assert last.report.num_cached_tokens == 0


def test_going_shallower_frees_the_deep_pages_at_once_and_reports_both_depths() -> None:
    engine = make_engine(runner=ScriptedRunner(rule=depth_letter))
    add(engine, make_request("r", "abcdefgh", max_tokens=6), 6)
    results: dict[str, Collected] = {}
    for _ in range(3):
        collect(engine.step(), results)
    before = engine.stats().kv_pages_used

    go_shallower(engine, "r", 2)

    assert engine.stats().kv_pages_used == before // 3
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()
    report = results["r"].last.report if results["r"].last else None
    assert report is not None
    assert report.tokens_by_exit == {6: 3, 2: 3}
    assert results["r"].exits == [6, 6, 6, 2, 2, 2]


def test_an_aborted_request_frees_everything_at_once() -> None:
    engine = make_engine()
    add(engine, make_request("r", "a" * 30, max_tokens=50))
    engine.step()
    assert engine.stats().kv_pages_used > 0

    output = engine.abort("r")

    assert output is not None
    assert output.finish_reason == "abort"
    assert engine.stats().kv_pages_used == 0
    assert engine.abort("r") is None
    assert not engine.has_work


def test_a_stop_string_across_tokens_is_cut_exactly() -> None:
    engine = make_engine()
    add(engine, make_request("r", "a", max_tokens=20, stop=("fgh",)))

    result = run(engine)["r"]

    assert result.text == "bcde"
    assert result.last is not None
    assert result.last.finish_reason == "stop"
