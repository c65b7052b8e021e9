"""Budgets: what may be said, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sortserve.core.budget import Budget, ExitInfo, ExitTable
from sortserve.core.errors import InvalidRequestError
from support.scripted import make_exits

EXITS = make_exits(9, 15, 30)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"latency_ms": 0}, "latency_ms"),
        ({"latency_ms": -5}, "latency_ms"),
        ({"ttft_ms": math.nan}, "ttft_ms"),
        ({"tpot_ms": math.inf}, "tpot_ms"),
        ({"latency_ms": "fast"}, "latency_ms"),
        ({"latency_ms": True}, "latency_ms"),
        ({"compute": 0}, "compute"),
        ({"compute": 1.1}, "compute"),
        ({"min_quality": 2}, "min_quality"),
        ({"exit_layer": 0}, "exit_layer"),
        ({"exit_layer": 9.5}, "exit_layer"),
        ({"min_exit_layer": -1}, "min_exit_layer"),
        ({"on_miss": "panic"}, "on_miss"),
        ({"speed": 3}, "speed"),
        ({"exit_layer": 9, "compute": 0.5}, "compute"),
        ({"exit_layer": 9, "min_exit_layer": 9}, "min_exit_layer"),
        ({"exit_layer": 9, "min_quality": 0.5}, "min_quality"),
        ({"ttft_ms": 200, "latency_ms": 100}, "ttft_ms"),
    ],
)
def test_a_bad_budget_is_refused_with_the_field(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        Budget.from_mapping(values)

    assert error.value.param == f"budget.{param}"
    assert f"budget.{param}" in error.value.message


TIMES, SHARES = ("latency_ms", "ttft_ms", "tpot_ms"), ("compute", "min_quality")
HUGE = int("9" * 310)  # no float is as large


@pytest.mark.parametrize("name", [*TIMES, *SHARES])
@pytest.mark.parametrize("value", [HUGE, -HUGE, 0, -1, math.inf, -math.inf, math.nan, True, "1"])
def test_a_number_out_of_range_is_told_its_own_value_and_both_bounds(
    name: str, value: object
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        Budget.from_mapping({name: value})

    allowed = "a number of milliseconds above 0, to 86400000"
    if name in SHARES:
        allowed = "a number above 0, to 1"
    assert repr(value)[:100] in error.value.message
    assert error.value.message.endswith(f"is not allowed: it must be {allowed}.")
    assert len(error.value.message) < 250


@pytest.mark.parametrize(
    ("name", "highest", "above"),
    [*((name, 86_400_000, 86_400_001) for name in TIMES), *((n, 1, 1.0000001) for n in SHARES)],
)
def test_the_highest_number_is_allowed_and_the_next_is_not(
    name: str, highest: float, above: float
) -> None:
    Budget.from_mapping({name: highest})

    with pytest.raises(InvalidRequestError):
        Budget.from_mapping({name: above})


@pytest.mark.parametrize("name", ["exit_layer", "min_exit_layer"])
def test_a_huge_exit_is_no_exit(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"\[9, 15, 30\]") as error:
        EXITS.allowed(Budget.from_mapping({name: HUGE}))

    assert len(error.value.message) < 250


def test_null_means_absent() -> None:
    assert Budget.from_mapping({"latency_ms": None, "on_miss": None}) == Budget()


def test_an_explicit_exit_may_carry_latency_bounds() -> None:
    budget = Budget.from_mapping({"exit_layer": 15, "latency_ms": 100})

    assert EXITS.allowed(budget) == (15,)


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({}, (9, 15, 30)),
        ({"min_exit_layer": 10}, (15, 30)),
        ({"compute": 0.5}, (9,)),
        ({"min_quality": 0.5}, (15, 30)),
        ({"min_quality": 0.4, "compute": 0.6}, (15,)),
        ({"compute": 1.0}, (9, 15, 30)),
    ],
)
def test_bounds_leave_the_exits_that_keep_them(
    values: dict[str, Any], allowed: tuple[int, ...]
) -> None:
    assert EXITS.allowed(Budget.from_mapping(values)) == allowed


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"exit_layer": 12}, "exit_layer"),
        ({"min_exit_layer": 31}, "min_exit_layer"),
        ({"compute": 0.1}, "compute"),
        ({"compute": 0.4, "min_exit_layer": 15}, "compute"),
    ],
)
def test_bounds_that_no_exit_keeps_are_refused(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        EXITS.allowed(Budget.from_mapping(values))

    assert error.value.param == f"budget.{param}"


def test_a_quality_floor_needs_measured_scores() -> None:
    exits = ExitTable(
        (
            ExitInfo(exit_layer=9, num_parameters=1, compute=0.4),
            ExitInfo(exit_layer=30, num_parameters=2, compute=1.0),
        )
    )

    with pytest.raises(InvalidRequestError, match=r"sorted\.json"):
        exits.allowed(Budget(min_quality=0.9))


def test_deadlines_count_from_the_arrival() -> None:
    deadlines = Budget(latency_ms=500, ttft_ms=100, tpot_ms=20).deadlines(10.0)

    assert (deadlines.e2e_s, deadlines.ttft_s, deadlines.tpot_s) == (10.5, 10.1, 0.02)
