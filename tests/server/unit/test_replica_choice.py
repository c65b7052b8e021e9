"""Which replica gets a request: by what it would get there, and by what that costs others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.core.budget import Budget, OnMiss
from sortserve.replicas.bands import Mix
from sortserve.replicas.choice import (
    MAX_AGE_S,
    Candidate,
    Choice,
    RoutedRequest,
    Sent,
    choose_replica,
)
from sortserve.replicas.load import EngineLoad, ExitLoad
from sortserve.replicas.place import pace_of

NOW = 100.0
LAYERS = (2, 4, 6)


def make_load(*, slowness: float = 1.0, rate: float = 0.0, **fields: object) -> EngineLoad:
    """A replica whose steps take a millisecond a layer, and which makes ``rate`` of them."""
    exits = tuple(
        ExitLoad(
            exit_layer=layer,
            score=layer / 6,
            compute=layer / 6,
            ttft_ms=slowness * 10.0,
            tpot_ms=slowness * layer,
            step_ms=slowness * layer,
            row_ms=slowness * 0.01 * layer,
            prompt_ms=slowness * layer,
            prompt_token_ms=slowness * 0.01 * layer,
            steps_per_s=rate,
        )
        for layer in LAYERS
    )
    base = EngineLoad(time_s=NOW, exits=exits, min_quality=0.0, num_free_pages=100, num_pages=100)
    return replace(base, **fields)  # type: ignore[arg-type]


def make_request(**fields: object) -> RoutedRequest:
    known = {"arrival_s": NOW, "num_prompt_tokens": 100, "num_output_tokens": 20, **fields}
    return RoutedRequest(**known)  # type: ignore[arg-type]


def candidate(replica_id: str, load: EngineLoad | None, **fields: object) -> Candidate:
    return Candidate(replica_id=replica_id, load=load, **fields)  # type: ignore[arg-type]


def choose(*candidates: Candidate, request: RoutedRequest | None = None) -> Choice:
    return choose_replica(candidates, request or make_request(), now=NOW)


def order(choice: Choice) -> list[str]:
    return [ranked.replica_id for ranked in choice.ranked]


IDLE = make_load()
BUSY = make_load(pressure=0.9, decode_pressure=0.9, floor_pressure=0.9, floor_decode_pressure=0.9)


# ---- examples ----


def test_a_request_goes_where_its_deepest_exit_is_reachable() -> None:
    """Twenty tokens within 100 ms: 6 layers a token are too slow for the slow replica."""
    request = make_request(budget=Budget(latency_ms=160, on_miss=OnMiss.REJECT))

    choice = choose(candidate("a", make_load(slowness=2.0)), candidate("b", IDLE), request=request)

    assert [(r.replica_id, r.exit_layer) for r in choice.ranked] == [("b", 6), ("a", 2)]


def test_of_replicas_that_can_give_the_same_the_one_with_less_pressure_is_first() -> None:
    assert order(choose(candidate("a", BUSY), candidate("b", IDLE))) == ["b", "a"]


@pytest.mark.parametrize("budget", [Budget(), Budget(latency_ms=2000)])
def test_a_cached_prefix_draws_a_request_to_its_replica(budget: Budget) -> None:
    warm = make_load(prefixes={"x": 6}, pressure=0.05, decode_pressure=0.05)
    request = make_request(budget=budget, prefixes=((64, "x"),))

    choice = choose(candidate("a", IDLE), candidate("b", warm), request=request)

    assert order(choice) == ["b", "a"]
    assert choice.ranked[0].num_cached_tokens == 64


def test_a_prefix_that_is_cached_less_deep_than_the_exit_counts_for_nothing() -> None:
    shallow = make_load(prefixes={"x": 4})
    request = make_request(prefixes=((64, "x"),))

    assert choose(candidate("a", shallow), request=request).ranked[0].num_cached_tokens == 0


def test_a_prefix_does_not_draw_a_request_to_a_replica_that_is_full() -> None:
    request = make_request(budget=Budget(latency_ms=2000), prefixes=((64, "x"),))
    warm = replace(BUSY, prefixes={"x": 6}, pressure=0.99, decode_pressure=0.99)

    assert order(choose(candidate("a", IDLE), candidate("b", warm), request=request)) == ["a", "b"]


def test_fast_tokens_go_where_steps_are_made_so_often_anyhow() -> None:
    """Steps nest: a second row with the same pace costs no steps of its own."""
    fast = make_load(rate=60.0, pressure=0.6, decode_pressure=0.6)
    slow = make_load(rate=5.0, pressure=0.5, decode_pressure=0.5)
    request = make_request(num_output_tokens=50, budget=Budget(latency_ms=1000))

    assert order(choose(candidate("a", slow), candidate("b", fast), request=request)) == ["b", "a"]


def test_that_nobody_can_keep_the_budget_is_said() -> None:
    request = make_request(budget=Budget(latency_ms=10, on_miss=OnMiss.REJECT))

    choice = choose(candidate("a", IDLE), candidate("b", BUSY), request=request)

    assert not choice.fits
    assert [ranked.exit_layer for ranked in choice.ranked] == [None, None]


def test_a_silent_replica_comes_after_those_that_fit_and_before_those_that_do_not() -> None:
    request = make_request(budget=Budget(latency_ms=180, on_miss=OnMiss.REJECT))
    full = replace(BUSY, floor_pressure=2.0, floor_decode_pressure=2.0, pressure=2.0)

    choice = choose(
        candidate("a", full), candidate("b", None), candidate("c", IDLE), request=request
    )

    assert order(choice) == ["c", "b", "a"]
    assert choice.fits


def test_of_silent_replicas_the_one_with_fewer_requests_under_way_is_first() -> None:
    silent = (candidate("a", None, num_ongoing=3), candidate("b", None, num_ongoing=1))

    assert order(choose(*silent)) == ["b", "a"]


@pytest.mark.parametrize("load", [replace(IDLE, is_calibrated=False), IDLE])
def test_a_report_without_times_or_of_long_ago_says_nothing(load: EngineLoad) -> None:
    [ranked] = choose(candidate("a", load, age_s=MAX_AGE_S + 1.0)).ranked

    assert not ranked.is_known


def test_who_takes_nothing_is_left_out() -> None:
    closed = replace(IDLE, is_accepting=False)

    assert order(choose(candidate("a", closed), candidate("b", BUSY))) == ["b"]
    assert choose(candidate("a", closed)) == Choice(ranked=())


def test_what_was_sent_since_the_report_counts() -> None:
    """Or everybody would go to the one that was idle a moment ago."""
    request = make_request(budget=Budget(latency_ms=400))
    sent = [Sent(request=request, exit_layer=6, sent_s=NOW)] * 5

    choice = choose(candidate("a", IDLE, sent=sent), candidate("b", IDLE), request=request)

    assert order(choice) == ["b", "a"]


def test_a_request_without_a_budget_shuns_the_prompts_that_wait() -> None:
    long_queue = make_load(soft_ms=5000.0)

    assert order(choose(candidate("a", long_queue), candidate("b", IDLE))) == ["b", "a"]


def test_a_request_that_no_exit_is_open_to_is_for_the_replica_to_refuse() -> None:
    request = make_request(budget=Budget(min_exit_layer=9))

    choice = choose(candidate("a", IDLE), request=request)

    assert order(choice) == ["a"]
    assert not choice.fits


def test_a_prefix_decides_only_between_replicas_that_are_as_crowded() -> None:
    """Four chats of one prompt that come at once are shared by two idle replicas."""
    warm, request = make_load(prefixes={"x": 6}), make_request(prefixes=((64, "x"),))
    sent: dict[str, list[Sent]] = {"a": [], "b": []}
    for _ in range(4):
        cold = candidate("a", IDLE, sent=sent["a"])
        choice = choose(cold, candidate("b", warm, sent=sent["b"]), request=request)
        first = choice.ranked[0]
        sent[first.replica_id].append(
            Sent(request=request, exit_layer=first.exit_layer, sent_s=NOW)
        )

    assert {name: len(own) for name, own in sent.items()} == {"a": 2, "b": 2}


def test_of_large_crowds_about_the_same_number_is_the_same() -> None:
    warm, cold = make_load(prefixes={"x": 6}, num_running=42), make_load(num_running=40)
    request = make_request(prefixes=((64, "x"),))

    assert order(choose(candidate("a", cold), candidate("b", warm), request=request)) == ["b", "a"]


# ---- homes ----

HURRIED = make_request(budget=Budget(latency_ms=160, on_miss=OnMiss.REJECT))
PATIENT = make_request(budget=Budget(latency_ms=5000, on_miss=OnMiss.REJECT))


def mix_of(*requests: RoutedRequest) -> Mix:
    mix = Mix()
    for request in requests:
        pace = pace_of(request, {"a": IDLE}, now=NOW)
        assert pace is not None
        mix.add(pace)
    return mix


def choose_of_six(request: RoutedRequest, mix: Mix | None, idle: str = "abcdef") -> list[str]:
    loaded = make_load(pressure=0.3, decode_pressure=0.3, num_running=3)
    candidates = [candidate(name, IDLE if name in idle else loaded) for name in "abcdef"]
    return order(choose_replica(candidates, request, now=NOW, mix=mix))


def test_the_hurried_and_the_patient_keep_apart() -> None:
    """The first begin at the front, the others behind the 3.5 of six replicas that those need."""
    mix = mix_of(*[HURRIED, PATIENT] * 50)

    assert choose_of_six(HURRIED, mix, idle="f")[:2] == ["a", "b"]
    assert set(choose_of_six(PATIENT, mix, idle="a")[:4]) == {"b", "c", "d", "e"}


def test_a_replica_keeps_its_place_whatever_is_learned_under_load() -> None:
    """f says that its steps take no time, and then that its rows take all."""
    mix, learned = mix_of(*[HURRIED, PATIENT] * 50), make_load(slowness=0.1)
    candidates = [candidate(name, IDLE, first_load=IDLE) for name in "abcde"]
    candidates.append(candidate("f", learned, first_load=IDLE))

    choice = choose_replica(candidates, HURRIED, now=NOW, mix=mix)

    assert {r.replica_id for r in choice.ranked if r.is_home} == {"a", "b"}


def test_who_is_left_out_keeps_its_place_in_the_row() -> None:
    mix = mix_of(*[HURRIED, PATIENT] * 50)
    candidates = [candidate(name, IDLE) for name in "abcdef"]

    choice = choose_replica(candidates, HURRIED, now=NOW, mix=mix, not_to={"a"})

    assert sorted(order(choice)) == list("bcdef")
    assert {r.replica_id for r in choice.ranked if r.is_home} == {"b"}


def test_who_does_not_fit_at_home_goes_elsewhere() -> None:
    full = replace(BUSY, floor_pressure=2.0, floor_decode_pressure=2.0, pressure=2.0)
    mix = mix_of(*[PATIENT] * 99)
    candidates = [candidate(name, full) for name in "abcde"] + [candidate("f", IDLE)]

    choice = choose_replica(candidates, HURRIED, now=NOW, mix=mix)

    assert order(choice)[0] == "f"
    assert [r.replica_id for r in choice.ranked if r.is_home] == ["a", "b"]


def test_who_bounds_no_time_is_at_home_everywhere() -> None:
    mix = mix_of(*[HURRIED, PATIENT] * 50)

    assert [choose_of_six(make_request(), mix, idle=name)[0] for name in "af"] == ["a", "f"]


def test_where_nothing_is_known_of_the_traffic_everybody_is_at_home_everywhere() -> None:
    for request in (HURRIED, PATIENT):
        assert choose_of_six(request, Mix(), idle="f") == choose_of_six(request, None, idle="f")


# ---- what holds always ----

shares = st.floats(0.0, 1.5)
small = st.floats(0.0, 1.0)


@st.composite
def loads(draw: st.DrawFn) -> EngineLoad:
    decode = draw(shares)
    pressure = decode + draw(small)
    due = sorted(draw(st.lists(st.floats(1.0, 2000.0), max_size=4, unique=True)))
    works = sorted(draw(st.lists(small, min_size=len(due), max_size=len(due))))
    return make_load(
        slowness=draw(st.floats(0.2, 5.0)),
        rate=draw(st.floats(0.0, 100.0)),
        decode_pressure=decode,
        pressure=pressure,
        floor_pressure=pressure * (part := draw(small)),
        floor_decode_pressure=decode * part,
        floor_loss=draw(st.floats(0.0, 10.0)),
        due=tuple((d, 100.0 * w) for d, w in zip(due, works, strict=True)),
        soft_ms=draw(st.floats(0.0, 5000.0)),
        prefixes=draw(st.sampled_from([{}, {"x": 6}])),
    )


requests = st.builds(
    make_request,
    num_prompt_tokens=st.integers(1, 2000),
    num_output_tokens=st.integers(1, 200),
    weight=st.floats(0.1, 10.0),
    prefixes=st.sampled_from([(), ((16, "x"),)]),
    budget=st.builds(
        Budget,
        latency_ms=st.none() | st.floats(5_000.0, 20_000.0),
        ttft_ms=st.none() | st.floats(10.0, 5_000.0),
        tpot_ms=st.none() | st.floats(1.0, 200.0),
        on_miss=st.sampled_from(OnMiss),
    ),
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Candidate, Candidate]:
    """A replica, and another that is worse in all it says."""
    load, age_s = draw(loads()), draw(st.floats(0.0, 5.0))
    more, worse_s = draw(small), draw(st.floats(0.0, 4.0))
    worse = replace(
        load,
        pressure=load.pressure + more + draw(small),
        decode_pressure=load.decode_pressure + more,
        floor_pressure=load.floor_pressure + more,
        floor_decode_pressure=load.floor_decode_pressure + more,
        floor_loss=load.floor_loss + draw(small),
        soft_ms=load.soft_ms + 1000.0 * draw(small),
        prefixes=draw(st.sampled_from([{}, load.prefixes])),
    )
    # A report that is older says less of what is due; compare the same moment.
    age = {"age_s": age_s} if load.due else {"age_s": age_s + worse_s}
    return candidate("b", load, age_s=age_s), candidate("a", worse, **age)


@given(pairs(), requests)
def test_a_replica_that_is_better_in_everything_is_never_ranked_below(
    pair: tuple[Candidate, Candidate], request: RoutedRequest
) -> None:
    choice = choose(*pair, request=request)
    better = next(r for r in choice.ranked if r.replica_id == "b")
    worse = next(r for r in choice.ranked if r.replica_id == "a")

    is_equal = replace(better, replica_id="") == replace(worse, replica_id="")
    assert is_equal or order(choice) == ["b", "a"]


@given(loads(), st.floats(0.0, 4.0), st.floats(0.01, 4.0), requests)
def test_slack_is_believed_less_the_older_its_report_is(
    load: EngineLoad, age_s: float, older_s: float, request: RoutedRequest
) -> None:
    load = replace(load, due=())
    fresh, stale = (
        choose(candidate("a", load, age_s=age), request=request).ranked[0]
        for age in (age_s, age_s + older_s)
    )

    if fresh.exit_layer == stale.exit_layer is not None:
        assert stale.pressure >= fresh.pressure
        assert stale.value <= fresh.value


@given(st.lists(loads(), min_size=1, max_size=5), requests, st.randoms(use_true_random=False))
def test_the_ranking_does_not_depend_on_the_order_of_the_candidates(
    reports: list[EngineLoad], request: RoutedRequest, random: object
) -> None:
    candidates = [candidate(str(i), load) for i, load in enumerate(reports)]
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    choice = choose(*candidates, request=request)

    assert choose(*shuffled, request=request) == choice
    assert sorted(order(choice)) == [c.replica_id for c in candidates]
    assert all(math.isfinite(r.value) for r in choice.ranked)


@given(st.lists(loads(), min_size=1, max_size=5), requests)
def test_where_an_exit_fits_is_never_ranked_below_where_none_does(
    reports: list[EngineLoad], request: RoutedRequest
) -> None:
    choice = choose(*(candidate(str(i), r) for i, r in enumerate(reports)), request=request)

    fits = [ranked.exit_layer is not None for ranked in choice.ranked]
    assert fits == sorted(fits, reverse=True)
    assert choice.fits == any(fits)
