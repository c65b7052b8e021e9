"""What a fault may cost, and what it may not."""

from __future__ import annotations

from benchmarks.lib.fault_case import Outcome
from benchmarks.lib.fault_cases import fault_cases
from benchmarks.lib.fault_load import Answer, Ask, End, Round, text_of
from benchmarks.lib.fault_verdicts import problems_with
from benchmarks.lib.faulty_server import POINTS, Board, Order

TEXTS = {"a": "one", "b": "two"}
HEALTHY, DOWN, GONE = (200, 200), (503, 503), (0, 0)


def got(a: End = "whole", b: End = "whole", *, text: str = "one", longest_s: float = 0.5) -> Round:
    """Two answers."""
    return Round(
        [Answer(Ask("a", "/", {}), a, text=text), Answer(Ask("b", "/", {}), b, text="two")],
        longest_s,
    )


def problems(
    outcome: Outcome,
    round_: Round,
    health: tuple[int, int] = HEALTHY,
    exit_code: int | None = None,
) -> int:
    return len(
        problems_with(
            outcome, round_, expected=TEXTS, within_s=2.0, health=health, exit_code=exit_code
        )
    )


def test_there_are_at_least_thirty_faults_and_each_has_its_name() -> None:
    names = [case.name for case in fault_cases()]

    assert len(names) >= 30
    assert len(set(names)) == len(names)
    assert {case.point for case in fault_cases()} - {None} <= set(POINTS)


def test_nobody_may_notice_a_harmless_fault() -> None:
    assert problems(Outcome.UNNOTICED, got()) == 0
    assert problems(Outcome.UNNOTICED, got("error")) == 1
    assert problems(Outcome.UNNOTICED, got("cut")) == 1
    assert problems(Outcome.UNNOTICED, got("none")) == 1
    assert problems(Outcome.UNNOTICED, got(text="other")) == 1
    assert problems(Outcome.UNNOTICED, got(longest_s=3.0)) == 1
    assert problems(Outcome.UNNOTICED, got(), DOWN) == 1


def test_one_request_and_no_more_pays_for_a_fault_of_its_own() -> None:
    assert problems(Outcome.ONE_FAILS, got("error")) == 0
    assert problems(Outcome.ONE_FAILS, got()) == 1
    assert problems(Outcome.ONE_FAILS, got("error", "error")) == 1
    assert problems(Outcome.ONE_FAILS, got("cut")) == 2


def test_an_engine_that_ends_answers_everybody_and_says_so() -> None:
    assert problems(Outcome.ENGINE_ENDS, got("error", "error"), DOWN, 1) == 0
    assert problems(Outcome.ENGINE_ENDS, got("error", "error"), GONE, 1) == 0
    assert problems(Outcome.ENGINE_ENDS, got("error", "cut"), DOWN, 1) == 1
    assert problems(Outcome.ENGINE_ENDS, got(), DOWN, 1) == 1
    assert problems(Outcome.ENGINE_ENDS, got("error", "error"), HEALTHY, None) == 2


def test_a_drain_loses_nobody() -> None:
    assert problems(Outcome.DRAINS, got(), GONE, 0) == 0
    assert problems(Outcome.DRAINS, got("error"), GONE, 0) == 1
    assert problems(Outcome.DRAINS, got("cut"), GONE, 0) == 1
    assert problems(Outcome.DRAINS, got(), GONE, 143) == 1


def test_a_point_strikes_as_often_as_it_is_told_to() -> None:
    board = Board()
    board.pass_by("forward")
    board.arm("forward", Order("raise", times=2))
    raised = 0
    for _ in range(4):
        try:
            board.pass_by("forward")
        except RuntimeError:
            raised += 1

    assert (raised, board.struck) == (2, {"forward": 2})


def test_the_text_of_every_route_is_found() -> None:
    assert text_of({"choices": [{"text": "a"}, {"text": "b"}]}) == "ab"
    assert text_of({"choices": [{"delta": {"content": "a"}}]}) == "a"
    assert text_of({"choices": [{"message": {"content": "a"}}]}) == "a"
    assert text_of({"output": [{"content": [{"text": "a"}]}]}) == "a"
    assert text_of(None) == ""
