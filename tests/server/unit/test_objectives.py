"""The three objectives through the whole engine, on a machine that is asked for too much."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.request import Request
from sortserve.scheduling.objective import OBJECTIVES
from support.timed import COSTS, MODEL, Timed, make_timed, timed_request

SCORES = {2: 0.2, 4: 0.65, 6: 1.0}
"""Of a small model: leaving out the last layers costs much."""
FULL = 6


def crowd(on_miss: str, seed: int, count: int = 60, gap_s: float = 0.015) -> list[Request]:
    """More than the machine can answer at full depth; each eighth has no budget."""
    rng, at, requests = random.Random(seed), 0.0, []
    for i in range(count):
        at += rng.expovariate(1 / gap_s)
        num_prompt, max_tokens = rng.choice([10, 40, 120]), rng.randint(5, 40)
        prompt_s = MODEL.prefill_s(FULL, num_prompt)
        alone_s = prompt_s + (max_tokens - 1) * COSTS.decode_s(FULL, num_prompt)
        latency_ms = 1e3 * alone_s * rng.choice([1.5, 3.0, 8.0])
        budget = {"latency_ms": latency_ms, "on_miss": on_miss} if i % 8 else {}
        request = timed_request(str(i), num_prompt, max_tokens=max_tokens, at=at, **budget)
        requests.append(replace(request, weight=rng.choice([0.01, 1.0, 100.0])))
    return requests


@cache
def served(objective: str, on_miss: str, seed: int) -> Timed:
    timed = make_timed(objective=objective, scores=tuple(SCORES.values()), seed=seed)
    timed.run(crowd(on_miss, seed))
    return timed


def answered(timed: Timed) -> Iterable[tuple[str, bool, float]]:
    """Of each answer to a budget, whose it is, whether it was in time, and its mean score."""
    for request_id, report in timed.reports.items():
        if report.budget.has_latency:
            tokens = report.tokens_by_exit
            score = sum(SCORES[e] * n for e, n in tokens.items()) / max(1, sum(tokens.values()))
            yield request_id, bool(report.met), score


@pytest.mark.parametrize("on_miss", ["reject", "degrade", "truncate"])
@pytest.mark.parametrize("seed", [0, 1])
def test_for_depth_nobody_is_served_shallower_however_late(on_miss: str, seed: int) -> None:
    timed = served("depth", on_miss, seed)

    assert {e for r in timed.reports.values() for e in r.tokens_by_exit} == {FULL}
    assert not any(r.degraded for r in timed.reports.values())
    missed = sum(not met for _, met, _ in answered(timed)) + len(timed.refusals)
    assert missed > 0, "or the machine was not asked for too much"


def test_for_depth_a_long_queue_takes_nothing_off_either() -> None:
    timed = make_timed(
        objective="depth", overload_delay_s=0.05, overload_degrade=True, max_num_seqs=2
    )

    timed.run(timed_request(str(i), 100, min_exit_layer=2) for i in range(60))

    assert {e for r in timed.reports.values() for e in r.tokens_by_exit} == {FULL}


def test_for_depth_a_refusal_names_the_exit_that_would_have_been_served() -> None:
    timed = make_timed(objective="depth")
    timed.arrive(timed_request("r", 100, latency_ms=5, on_miss="reject"))

    refusal = timed.refusals["r"]

    assert isinstance(refusal, BudgetUnattainableError)
    assert ": exit 6 needs " in str(refusal)


@pytest.mark.parametrize(
    ("objective", "budget", "expected"),
    [
        ("quality", {"latency_ms": 60_000}, 4),
        ("quality", {"tpot_ms": 60_000, "min_exit_layer": 4}, 4),
        ("quality", {"latency_ms": 60_000, "min_exit_layer": 6}, 6),
        ("quality", {"latency_ms": 60_000, "exit_layer": 6}, 6),
        ("quality", {"latency_ms": 60_000, "schedule": [[0, 6]]}, 6),
        ("quality", {}, 6),
        ("attainment", {"latency_ms": 60_000}, 6),
        ("depth", {"latency_ms": 60_000}, 6),
    ],
)
def test_depth_that_has_no_better_score_takes_no_time_from_others(
    objective: str, budget: dict[str, Any], expected: int
) -> None:
    """The exit at 80 % of the layers ties the full depth, and an idle machine serves it too."""
    timed = make_timed(objective=objective, scores=(0.5, 1.0, 1.0))

    timed.run([timed_request("r", 20, max_tokens=5, **budget)])

    assert timed.reports["r"].tokens_by_exit == {expected: 5}


def test_attainment_meets_most_budgets_and_quality_has_most_quality() -> None:
    """Quality by what each request weighs: that is what the objective weighs."""
    met, goodput = dict.fromkeys(OBJECTIVES, 0), dict.fromkeys(OBJECTIVES, 0.0)
    for objective, seed in itertools.product(OBJECTIVES, range(4)):
        weights = {r.request_id: r.weight for r in crowd("reject", seed)}
        for request_id, in_time, score in answered(served(objective, "reject", seed)):
            met[objective] += in_time
            goodput[objective] += weights[request_id] * in_time * score

    assert max(met, key=met.__getitem__) == "attainment", met
    assert max(goodput, key=goodput.__getitem__) == "quality", goodput


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_nobody_starves_whatever_their_weight(objective: str) -> None:
    light = [
        replace(timed_request(f"light{i}", 20, max_tokens=5, at=0.01), weight=1e-3)
        for i in range(2)
    ]
    kinds: dict[str, dict[str, float]] = {
        "whole": {"latency_ms": 3000},
        "pace": {"tpot_ms": 100},
        "plain": {},
    }
    late = timed_request("late", 20, max_tokens=5, at=0.01, latency_ms=1)
    heavy = [
        replace(timed_request(f"{kind}{i}", 60, max_tokens=30, at=0.1 * i, **budget), weight=1e3)
        for i in range(24)
        for kind, budget in kinds.items()
    ]
    timed = make_timed(objective=objective, max_num_seqs=4, num_pages=200)

    timed.run([*heavy, *light, replace(late, weight=1e-3)])

    last = max(report.finished_s for report in timed.reports.values())
    for name in ("light0", "light1", "late"):
        assert timed.reports[name].finished_s < last / 2
