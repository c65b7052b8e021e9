"""What an engine says of itself is what admission finds there."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

from sortserve.core.budget import Budget
from sortserve.engine.desk import Reception, load_report
from sortserve.replicas.choice import Candidate, RoutedRequest, choose_replica
from sortserve.replicas.load import MAX_DUE, MAX_PREFIXES, EngineLoad
from sortserve.scheduling.capacity import pressure
from sortserve.scheduling.demand import StepCosts
from sortserve.scheduling.prefix_heads import MAX_BLOCKS, PrefixHeads, is_noted, prefix_digests
from support.scripted import ScriptedRunner, add, make_engine, make_request, run
from support.timed import MODEL, Timed, make_timed, timed_request


def report(timed: Timed) -> EngineLoad:
    timed.desk.see(timed.engine.demands())
    return load_report(timed.engine, timed.desk, timed.engine.stats())


def crowded(num: int = 6) -> Timed:
    """Some requests decode, and as many wait."""
    timed = make_timed(max_num_seqs=4)
    for i in range(num):
        timed.arrive(timed_request(str(i), 8, max_tokens=30, latency_ms=1500 + 100 * i))
    for _ in range(6):
        timed.step()
    return timed


def test_an_idle_engine_says_what_a_request_alone_would_take() -> None:
    load = report(make_timed())

    assert [own.exit_layer for own in load.exits] == [2, 4, 6]
    assert (load.pressure, load.floor_pressure, load.soft_ms, load.due) == (0.0, 0.0, 0.0, ())
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert load.is_calibrated
    costs = StepCosts(MODEL, safety=MODEL.safety)
    for own in load.exits:
        assert own.step_ms == pytest.approx(1e3 * costs.base_s(own.exit_layer))
        assert own.steps_per_s == 0.0
        assert own.ttft_ms is not None
        assert own.ttft_ms > own.prompt_ms > 0.0


def test_a_busy_engine_says_its_rows_its_queue_and_its_pages() -> None:
    timed = crowded()
    load, stats = report(timed), timed.engine.stats()

    assert sum(own.num_rows for own in load.exits) == load.num_running == stats.num_running == 4
    assert load.num_waiting == stats.num_waiting == 2
    assert load.num_waiting_tokens == 16
    assert load.num_free_pages == timed.engine.kv_cache.pool.num_free < load.num_pages
    assert load.num_slots == 4


def test_the_pressure_is_that_of_the_live_promises() -> None:
    timed = crowded()
    load, now = report(timed), timed.clock.now
    demands = timed.engine.demands()
    num_decoding = sum(d.is_decoding for d in demands)
    costs = StepCosts(MODEL, num_rows=num_decoding + 1, chunk=1024, safety=MODEL.safety)
    busy_s = timed.desk.look(lambda outlook: 0.0 if outlook is None else outlook.busy_s)

    assert load.pressure == pytest.approx(pressure(demands, costs, now=now, busy_s=busy_s))
    assert 0.0 < load.floor_pressure <= load.pressure
    assert load.decode_pressure <= load.pressure
    assert load.floor_loss > 0.0
    deepest = max(own.exit_layer for own in load.exits if own.num_rows)
    rates = {own.exit_layer: own.steps_per_s for own in load.exits}
    assert rates[deepest] == pytest.approx(max(1 / d.gap_s for d in demands if d.is_hard), rel=0.5)


def test_what_is_due_is_told_at_a_few_moments_and_in_full_by_the_last() -> None:
    timed = make_timed(max_num_seqs=2)
    for i in range(30):
        timed.arrive(timed_request(str(i), 8, max_tokens=3, latency_ms=4000 + 50 * i))
    load = report(timed)

    assert 0 < len(load.due) <= MAX_DUE
    assert list(load.due) == sorted(load.due)
    assert [work for _, work in load.due] == sorted(work for _, work in load.due)
    prompts = timed.desk.look(lambda outlook: () if outlook is None else outlook.prompts.work_s)
    assert load.due[-1][1] == pytest.approx(1e3 * sum(prompts))


def test_prompts_without_a_promise_are_told_apart() -> None:
    timed = make_timed(max_num_seqs=1)
    for i in range(3):
        timed.arrive(timed_request(str(i), 8))
    load = report(timed)

    assert load.due == ()
    assert load.soft_ms > 0.0


def test_an_engine_without_costs_says_so() -> None:
    engine = make_engine()
    reception = Reception(engine)
    load = reception.load(engine.stats(), is_accepting=False)

    assert not load.is_calibrated
    assert not load.is_accepting
    assert [own.ttft_ms for own in load.exits] == [None] * 3


def test_a_forecast_that_fails_leaves_a_report_without_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = crowded()
    monkeypatch.setattr("sortserve.replicas.load.forecast", lambda *_: 1 / 0)

    load = report(timed)

    assert not load.is_calibrated
    assert load.num_running == 4


@pytest.mark.parametrize("timed", [make_timed(), crowded()], ids=["idle", "busy"])
def test_a_report_survives_json_and_pickle(timed: Timed) -> None:
    load = report(timed)

    assert EngineLoad.from_document(json.loads(json.dumps(load.document))) == load
    assert pickle.loads(pickle.dumps(load)) == load


def test_what_a_newer_replica_says_beside_is_left_out() -> None:
    load = report(make_timed())

    assert EngineLoad.from_document({**load.document, "mood": "fine"}) == load


@pytest.mark.parametrize("document", [{}, {"exits": 3}, {"time_s": 1.0, "exits": [{}]}])
def test_what_is_no_report_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not what a replica says"):
        EngineLoad.from_document(document)


def test_a_report_is_short() -> None:
    timed = crowded()
    full = replace(report(timed), prefixes={f"{i:032x}": 6 for i in range(MAX_PREFIXES)})

    assert len(json.dumps(full.document)) < 20_000


@pytest.mark.parametrize("latency_ms", [50, 90, 120, 200, 400, 1000])
@pytest.mark.parametrize("num_live", [0, 2, 4])
def test_a_router_finds_the_exit_that_admission_gives(num_live: int, latency_ms: int) -> None:
    """As long as nobody is to go shallower for it, which a report only tells roughly."""
    timed = make_timed()
    for i in range(num_live):
        timed.arrive(timed_request(f"live{i}", 8, max_tokens=40, latency_ms=2000, exit_layer=4))
        timed.step()
    request = timed_request("new", 8, at=timed.clock.now, latency_ms=latency_ms, on_miss="reject")
    routed = RoutedRequest(
        arrival_s=request.arrival_s,
        num_prompt_tokens=8,
        num_output_tokens=10,
        budget=request.budget,
    )

    candidates = [Candidate(replica_id="a", load=report(timed))]
    found = choose_replica(candidates, routed, now=timed.clock.now).ranked[0]
    timed.arrive(request)

    given = timed.choices["new"].exit_layer if "new" in timed.choices else None
    assert found.exit_layer == given


# ---- prefixes ----


def test_an_engine_names_the_prefixes_that_it_holds_and_how_deep() -> None:
    engine = make_engine(runner=ScriptedRunner(num_pages=400))
    block_size = engine.kv_cache.block_size
    prompt = "abcdefgh" * block_size
    add(engine, make_request("deep", prompt, budget=Budget()), 6)
    add(engine, make_request("shallow", "z" + prompt, budget=Budget()), 2)
    run(engine)

    held = engine.kv_cache.held_prefixes(engine.exits.layers, most=100)

    deep = prefix_digests(tuple(map(ord, prompt)), block_size=block_size)
    shallow = prefix_digests(tuple(map(ord, "z" + prompt)), block_size=block_size)
    assert deep
    assert {held[digest] for _, digest in deep} == {6}
    assert {held[digest] for _, digest in shallow} == {2}
    assert len(engine.kv_cache.held_prefixes(engine.exits.layers, most=3)) == 3


def test_a_prefix_that_was_evicted_is_not_named() -> None:
    engine = make_engine(runner=ScriptedRunner(num_pages=400))
    prompt = "abcdefgh" * engine.kv_cache.block_size
    add(engine, make_request("r", prompt), 6)
    run(engine)
    assert engine.kv_cache.held_prefixes(engine.exits.layers, most=100)

    with engine.kv_cache.borrowed(engine.kv_cache.pool.num_free):
        assert engine.kv_cache.held_prefixes(engine.exits.layers, most=100) == {}


def test_prefixes_of_other_salts_have_other_names() -> None:
    tokens = tuple(range(100))

    plain, salted = (prefix_digests(tokens, block_size=16, salt=salt) for salt in ("", "secret"))

    assert [n for n, _ in plain] == [n for n, _ in salted] == [16, 32, 48, 64, 96]
    assert not {d for _, d in plain} & {d for _, d in salted}


def test_at_least_two_thirds_of_a_prefix_have_a_name() -> None:
    for num_blocks in range(1, MAX_BLOCKS + 1):
        longest = max(n for n in range(1, num_blocks + 1) if is_noted(n))
        assert 3 * longest >= 2 * num_blocks


def test_the_names_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sortserve.scheduling.prefix_heads.MAX_HEADS", 2)
    heads = PrefixHeads()
    for name in (b"a", b"b", b"a", b"c"):
        heads.note(name, 1)
    heads.note(b"odd", 5)

    assert heads.latest() == [b"c", b"a"]
