"""Was what came of a fault what had to come of it? Pure functions of plain values."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.lib.fault_case import Outcome
from benchmarks.lib.fault_load import Answer, Round

__all__ = ["problems_with"]

EXIT_CODES = {
    Outcome.ENGINE_ENDS: 1,
    Outcome.PROCESS_GONE: -9,
    Outcome.DRAINS: 0,
    Outcome.FORCED: 143,
    Outcome.LOOP_LOST: 1,
}
LIVES = frozenset({Outcome.UNNOTICED, Outcome.ONE_FAILS, Outcome.SOME_FAIL, Outcome.STARTS})


def problems_with(
    outcome: Outcome,
    got: Round,
    *,
    expected: Mapping[str, str],
    within_s: float,
    health: tuple[int, int],
    exit_code: int | None,
) -> list[str]:
    """What was not as it must be; empty if nothing.

    Args:
        outcome: what had to come of the fault.
        got: what became of the live requests.
        expected: their texts without a fault, by name.
        within_s: the last answer may come so long after the fault.
        health: the statuses of ``/health`` and ``/livez`` after the answers; 0: nobody there.
        exit_code: None: the process lives.
    """
    problems = [f"{a.ask.name} was not answered" for a in got.answers if a.end == "none"]
    if got.longest_s > within_s:
        problems.append(f"the last answer came after {got.longest_s:.2f} s, not {within_s:.2f}")
    problems += _wrong_ends(outcome, got)
    for name, text in got.texts().items():
        if outcome is not Outcome.FORCED and text != expected[name]:
            problems.append(f"{name} got another answer than without the fault")
    if outcome in LIVES and health != (200, 200):
        problems.append(f"health is {health}, not 200")
    if outcome not in LIVES and 200 in health and exit_code is None:
        problems.append(f"health is {health} although the server must end")
    if outcome in EXIT_CODES and exit_code != EXIT_CODES[outcome]:
        problems.append(f"the exit code is {exit_code}, not {EXIT_CODES[outcome]}")
    return problems


def _wrong_ends(outcome: Outcome, got: Round) -> list[str]:
    num_whole, num_errors, num_cut = (got.count(end) for end in ("whole", "error", "cut"))
    if outcome in (Outcome.PROCESS_GONE, Outcome.LOOP_LOST):
        return []
    problems = [f"{_told(a)} was cut" for a in got.answers if a.end == "cut"]
    if outcome in (Outcome.UNNOTICED, Outcome.STARTS, Outcome.DRAINS):
        problems += [f"{_told(a)} failed" for a in got.answers if a.end == "error"]
    elif outcome is Outcome.ONE_FAILS and num_errors != 1:
        problems.append(f"{num_errors} requests failed, not one")
    elif outcome is Outcome.ENGINE_ENDS and num_errors == 0:
        problems.append("nobody got an error")
    elif outcome is Outcome.SOME_FAIL and num_whole + num_errors + num_cut == 0:
        problems.append("nobody got an answer")
    return problems


def _told(answer: Answer) -> str:
    return f"{answer.ask.name} (HTTP {answer.status}: {answer.error})"
