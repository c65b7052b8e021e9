"""Scoring short answers, and telling whether long ones repeat themselves; cases by hand."""

from __future__ import annotations

import pytest

from sortserve.core.request import FinishReason
from sortserve_trainer.evaluation.answering import Answer, measure_answers, measure_fluency
from sortserve_trainer.evaluation.answers import normalise, score_answer
from sortserve_trainer.evaluation.rows import Question
from sortserve_trainer.model.repetition import ends_in_loop, repeated_ngrams


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Beatles", "beatles"),
        ("  An  apple, a pear\nand the END. ", "apple pear and end"),
        ("Motor-racing", "motor racing"),
        ("snake_case", "snake case"),
        ("\u2018Tis \u201cquoted\u201d", "tis quoted"),
        ("theatre and anthem", "theatre and anthem"),
        ("the", ""),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(
    text: str, normalised: str
) -> None:
    assert normalise(text) == normalised


@pytest.mark.parametrize(
    ("answer", "aliases", "exact_match", "f1", "contains"),
    [
        pytest.param("Paris", ["Paris"], 1, 1, 1, id="equal"),
        pytest.param("the paris!", ["London", "Paris"], 1, 1, 1, id="any-alias-will-do"),
        pytest.param("It is Paris.", ["Paris"], 0, 0.5, 1, id="in-a-sentence"),
        pytest.param("Paris, France", ["Paris"], 0, 2 / 3, 1, id="with-more"),
        pytest.param("Paris", ["Paris, France"], 0, 2 / 3, 0, id="with-less"),
        pytest.param("Parisian", ["Paris"], 0, 0, 0, id="a-word-is-whole"),
        pytest.param("red red red", ["red blue"], 0, 0.4, 0, id="a-word-counts-once"),
        pytest.param("", ["Paris"], 0, 0, 0, id="nothing"),
        pytest.param("", ["The"], 0, 0, 0, id="nothing-is-no-article"),
        pytest.param("\n\nParis\nis nice", ["Paris"], 1, 1, 1, id="first-line-counts"),
        pytest.param("London\nParis", ["Paris"], 0, 0, 0, id="later-lines-do-not"),
    ],
)
def test_an_answer_is_scored_against_its_best_alias(
    answer: str, aliases: list[str], exact_match: float, f1: float, contains: float
) -> None:
    score = score_answer(answer, aliases)

    assert score.exact_match == exact_match
    assert score.f1 == pytest.approx(f1)
    assert score.contains == contains


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        pytest.param([], 0.0, id="empty"),
        pytest.param([1, 1, 1], 0.0, id="shorter-than-a-4-gram"),
        pytest.param([1, 2, 3, 4, 5], 0.0, id="all-distinct"),
        pytest.param([1, 1, 1, 1, 1, 1], 2 / 3, id="one-of-three-is-new"),
        pytest.param([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5, id="the-last-came-before"),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_came_before(
    tokens: list[int], share: float
) -> None:
    assert repeated_ngrams(tokens) == pytest.approx(share)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        pytest.param(list(range(100)), False, id="no-repetition"),
        pytest.param([7] * 15, False, id="a-short-rule-of-dashes"),
        pytest.param([7] * 16, True, id="one-token-over-and-over"),
        pytest.param([*range(50), *[1, 2, 3] * 6], True, id="three-tokens-six-times"),
        pytest.param([*[1, 2, 3] * 6, *range(50, 60)], False, id="a-loop-that-was-left"),
        pytest.param([*range(30), *range(30)], False, id="said-twice"),
        pytest.param([*range(30)] * 3, True, id="said-three-times"),
        pytest.param([*[*range(30)] * 3, *range(11)], True, id="the-last-copy-is-cut-short"),
        pytest.param([*[*range(30)] * 2, *range(29)], False, id="a-third-copy-is-missing-its-end"),
        pytest.param([*range(65)] * 3, False, id="longer-than-a-sentence"),
        pytest.param([*range(64)] * 3, True, id="as-long-as-a-sentence"),
    ],
)
def test_a_loop_is_a_block_three_times_in_a_row_at_the_end(tokens: list[int], loops: bool) -> None:
    assert ends_in_loop(tokens) is loops


def answer(text: str, tokens: list[int], reason: FinishReason) -> Answer:
    return Answer(text=text, token_ids=tuple(tokens), finish_reason=reason)


def test_scores_of_a_file_are_means_over_its_questions() -> None:
    questions = [Question("Capital of France?", ("Paris",)), Question("Of Spain?", ("Madrid",))]
    answers = [
        answer("Paris", [5], FinishReason.STOP),
        answer("It is Madrid", [5], FinishReason.STOP),
    ]

    quality = measure_answers(questions, answers)

    assert (quality.exact_match, quality.contains, quality.num_questions) == (0.5, 1.0, 2)
    assert quality.f1 == pytest.approx((1 + 0.5) / 2)


def test_the_token_that_ends_an_answer_is_no_part_of_it() -> None:
    ended = answer("x", [1, 2, 3, 4, 99], FinishReason.STOP)
    cut = answer("x", [7] * 20, FinishReason.LENGTH)

    fluency = measure_fluency([ended, cut])

    assert fluency.mean_tokens == (4 + 20) / 2
    assert fluency.ended == 0.5
    assert fluency.loop_rate == 0.5
    assert fluency.repetition == pytest.approx((0 + 16 / 17) / 2)
