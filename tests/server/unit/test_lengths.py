"""Expected lengths of answers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.admission.lengths import (
    MAX_TABLES,
    MIN_ENDED,
    LengthEstimator,
    LengthKey,
    expected_tokens,
)
from sortserve.admission.overload import CALM_S, HOLD_S, DepthLevel, next_level
from support.scripted import make_request
from support.scripted_grammar import Form


def learned(lengths: list[int], quantile: float = 0.9, limit: int = 10_000) -> LengthEstimator:
    estimator = LengthEstimator(quantile)
    for length in lengths:
        estimator.observe(min(length, limit), cut=length > limit)
    return estimator


def exponential(mean: float, count: int) -> list[int]:
    rng = random.Random(0)
    return [1 + int(rng.expovariate(1 / mean)) for _ in range(count)]


def test_nothing_is_said_before_enough_answers_have_ended() -> None:
    estimator = learned([10] * (MIN_ENDED - 1))

    assert estimator.expect(0, 500) is None


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_the_wanted_share_of_answers_stays_within(quantile: float) -> None:
    lengths = exponential(80, 2000)
    expected = learned(lengths, quantile).expect(0, 10_000)

    assert expected is not None
    share = sum(length <= expected for length in lengths) / len(lengths)
    assert share == pytest.approx(quantile, abs=0.07)


def test_an_answer_that_has_come_far_is_expected_to_go_on() -> None:
    estimator = learned([20] * 90 + [500] * 30)

    early, late = estimator.expect(0, 10_000), estimator.expect(30, 10_000)

    assert early is not None
    assert late is not None
    assert late >= 400
    assert estimator.expect(450, 10_000) == pytest.approx(500, rel=0.25)
    assert estimator.expect(5000, 10_000) in range(5001, 10_001)


def test_answers_that_were_cut_off_do_not_look_short() -> None:
    lengths = exponential(200, 1000)
    free, cut = learned(lengths).expect(0, 150), learned(lengths, limit=100).expect(0, 150)

    assert free == 150
    assert cut is not None
    assert cut > 100


def test_the_limit_bounds_every_estimate() -> None:
    estimator = learned([400] * 50)

    assert estimator.expect(0, 30) == 30


def test_without_history_the_limit_is_planned_or_what_the_service_assumes() -> None:
    estimator = LengthEstimator()
    plain = make_request(max_tokens=300)

    assert expected_tokens(plain, 0, estimator) == 300
    assumed = replace(plain, expected_tokens=100)
    assert expected_tokens(assumed, 0, estimator) == 100
    assert 100 < expected_tokens(assumed, 100, estimator) <= 300
    assert expected_tokens(assumed, 299, estimator) == 300


def test_who_ignores_the_end_of_sequence_runs_to_the_limit() -> None:
    request = make_request(max_tokens=300, ignore_eos=True)

    assert expected_tokens(request, 0, learned([10] * 100)) == 300


# ---- each class its own lengths ----


def class_key(name: str, prompt_tokens: int = 100) -> LengthKey:
    prompt = tuple(range(prompt_tokens))
    request = replace(make_request(prompt=prompt), length_class=("/generate", name))
    return LengthKey.of(request)


@given(
    short=st.integers(1, 50),
    factor=st.integers(8, 40),
    order=st.lists(st.booleans(), min_size=4 * MIN_ENDED, max_size=120),
)
@settings(max_examples=30, deadline=None)
def test_two_classes_of_very_different_lengths_are_each_estimated_right(
    short: int, factor: int, order: list[bool]
) -> None:
    estimator, long = LengthEstimator(), short * factor
    words, pages = class_key("words"), class_key("pages")
    for is_page in [*order, *[True, False] * MIN_ENDED]:
        estimator.observe(long if is_page else short, cut=False, key=pages if is_page else words)

    assert estimator.expect(0, 10_000, words) == pytest.approx(short, rel=0.25, abs=1)
    assert estimator.expect(0, 10_000, pages) == pytest.approx(long, rel=0.25, abs=1)


def test_short_and_long_prompts_of_one_class_have_lengths_of_their_own() -> None:
    estimator = LengthEstimator()
    question, document = class_key("m", prompt_tokens=8), class_key("m", prompt_tokens=900)
    for _ in range(2 * MIN_ENDED):
        estimator.observe(10, cut=False, key=question)
        estimator.observe(400, cut=False, key=document)

    assert estimator.expect(0, 10_000, question) == pytest.approx(10, rel=0.25)
    assert estimator.expect(0, 10_000, document) == pytest.approx(400, rel=0.25)


def test_a_class_that_has_seen_little_is_planned_with_what_it_is_a_part_of() -> None:
    estimator = LengthEstimator()
    for _ in range(2 * MIN_ENDED):
        estimator.observe(300, cut=False, key=class_key("known", prompt_tokens=8))
    for _ in range(MIN_ENDED - 1):
        estimator.observe(20, cut=False, key=class_key("new"))

    other_prompts = estimator.expect(0, 10_000, class_key("known", prompt_tokens=900))
    assert other_prompts == pytest.approx(300, rel=0.25)  # its class
    assert estimator.expect(0, 10_000, class_key("new")) == pytest.approx(300, rel=0.25)  # all

    for _ in range(2):
        estimator.observe(20, cut=False, key=class_key("new"))
    assert estimator.expect(0, 10_000, class_key("new")) == pytest.approx(20, rel=0.25)  # its own


@given(st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=5, deadline=None)
def test_ten_thousand_names_take_no_more_memory_and_push_nobody_out(
    rng: random.Random, every: int
) -> None:
    estimator = LengthEstimator()
    for i in range(1_000):
        name = f"invented-{rng.randrange(10_000)}"
        estimator.observe(rng.randint(1, 500), cut=False, key=class_key(name))
        if i % (4 * every) == 0 or i < 2 * MIN_ENDED:
            estimator.observe(30, cut=False, key=class_key("regular"))
        assert estimator.num_tables <= MAX_TABLES

    assert estimator.expect(0, 10_000, class_key("regular")) == pytest.approx(30, rel=0.25)


def test_a_class_that_nobody_uses_any_more_makes_room() -> None:
    estimator = LengthEstimator()
    for i in range(MAX_TABLES):
        for _ in range(3):
            estimator.observe(100, cut=False, key=class_key(f"old-{i}"))
    for _ in range(3_000):  # by now the old ones count for less than one answer
        estimator.observe(30, cut=False, key=class_key("busy"))

    for _ in range(MIN_ENDED + 1):
        for i in range(10):
            estimator.observe(5, cut=False, key=class_key(f"new-{i}"))

    assert all(estimator.expect(0, 999, class_key(f"new-{i}")) == 5 for i in range(10))


# ---- depth of requests without a budget under overload ----


def play(delays: list[float], *, tick_s: float = 0.25, limit_s: float = 1.0) -> list[int]:
    level, levels = DepthLevel(), []
    for i, delay in enumerate(delays):
        level = next_level(level, queue_delay_s=delay, limit_s=limit_s, num_exits=3, now=i * tick_s)
        levels.append(level.num_down)
    return levels


def test_a_long_queue_lowers_the_depth_one_exit_at_a_time() -> None:
    levels = play([5.0] * 12)

    assert levels[0] == 1
    assert levels[int(HOLD_S / 0.25)] == 2
    assert levels[-1] == 2  # the shallowest of three


def test_the_depth_comes_back_only_after_a_calm_while() -> None:
    calm = int(CALM_S / 0.25)
    levels = play([5.0, *[0.1] * (calm + 2)])

    assert levels[calm] == 1
    assert levels[-1] == 0


def test_a_while_without_newcomers_counts_as_calm_from_when_the_queue_was_worked_off() -> None:
    overloaded = DepthLevel(num_down=2, changed_s=0.0)
    level = next_level(overloaded, queue_delay_s=5.0, limit_s=1.0, num_exits=3, now=10.0)

    def later(now: float) -> int:
        return next_level(level, queue_delay_s=0.0, limit_s=1.0, num_exits=3, now=now).num_down

    short_s = 10.0 + 4.5  # half of the limit is short
    assert later(short_s + 0.9 * CALM_S) == 2
    assert later(short_s + 1.1 * CALM_S) == 1
    assert later(short_s + 2.1 * CALM_S) == 0
    assert later(1e9) == 0


def test_a_queue_that_hovers_changes_nothing() -> None:
    assert play([5.0, *[0.8] * 40])[-1] == 1


def test_a_limit_of_zero_switches_it_off() -> None:
    assert set(play([9.0] * 20, limit_s=0.0)) == {0}


def test_forced_tokens_are_not_planned_for() -> None:
    lengths = LengthEstimator()
    form, other = (
        make_request(max_tokens=100, grammar=Form(text)) for text in ("known", "unknown")
    )
    assert expected_tokens(form, 0, lengths) == 100

    lengths.observe_forced(20, 80, "known")

    assert expected_tokens(form, 0, lengths) == 25
    assert expected_tokens(other, 0, lengths) == 25  # as far as is known of any grammar
    assert expected_tokens(make_request(max_tokens=100), 0, lengths) == 100
