"""Budgets: what may be said, and what is refused by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
RANGES = {
    **dict.fromkeys(TIMES, "a number of milliseconds above 0, to 86400000"),
    "compute": "a number above 0, to 1",
    "min_quality": "a number from 0 to 1",
}
HUGE = int("9" * 310)  # no float is as large


@pytest.mark.parametrize("name", [*TIMES, *SHARES])
@pytest.mark.parametrize("value", [HUGE, -HUGE, -1, math.inf, -math.inf, math.nan, True, "1"])
def test_a_number_out_of_range_is_told_its_own_value_and_both_bounds(
    name: str, value: object
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        Budget.from_mapping({name: value})

    written = "true" if value is True else repr(value)
    assert written[:100] in error.value.message
    assert error.value.message.endswith(f"is not allowed: it must be {RANGES[name]}.")
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
        ({"min_quality": 0}, (9, 15, 30)),
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


# ---- the floor of those who name none ----

FLOORED = dataclasses.replace(EXITS, min_quality=0.5)  # scores: 0.3, 0.5, 1


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({}, (15, 30)),
        ({"latency_ms": 1}, (15, 30)),
        ({"compute": 0.6}, (15,)),
        ({"exit_layer": 9}, (9,)),
        ({"min_exit_layer": 1}, (9, 15, 30)),
        ({"min_quality": 0.2}, (9, 15, 30)),
        ({"min_quality": 0}, (9, 15, 30)),
        ({"min_quality": 0.9}, (30,)),
        ({"min_quality": 0.2, "compute": 0.5}, (9,)),
    ],
)
def test_exits_below_the_servers_floor_are_for_who_names_them_or_a_floor(
    values: dict[str, Any], allowed: tuple[int, ...]
) -> None:
    assert FLOORED.allowed(Budget.from_mapping(values)) == allowed


def test_the_full_depth_is_always_served() -> None:
    highest = dataclasses.replace(EXITS, min_quality=1.0)

    assert highest.served_unasked == (30,)
    assert highest.allowed(Budget()) == (30,)


def test_where_nothing_was_measured_the_share_of_layers_is_the_score() -> None:
    exits = unmeasured(min_quality=0.5)

    assert exits.served_unasked == (15, 30)


def test_compute_that_the_servers_floor_leaves_no_exit_for_is_told_what_to_send() -> None:
    with pytest.raises(InvalidRequestError) as error:
        FLOORED.allowed(Budget(compute=0.4))

    assert error.value.param == "budget.compute"
    assert "this server's --min-quality=0.5" in error.value.message
    assert "budget.min_quality=0.3 or budget.exit_layer=9" in error.value.message
    for accepted in ({"min_quality": 0.3, "compute": 0.4}, {"exit_layer": 9}):
        assert FLOORED.allowed(Budget.from_mapping(accepted)) == (9,)


def test_where_nothing_was_measured_a_depth_is_proposed_as_the_floor() -> None:
    with pytest.raises(InvalidRequestError, match=r"budget\.min_exit_layer=9 or") as error:
        unmeasured(min_quality=0.5).allowed(Budget(compute=0.45))

    assert "--min-quality" in error.value.message


def test_an_answer_that_must_have_a_form_may_have_a_floor_of_its_own_whatever_was_measured() -> (
    None
):
    def allowed(exits: ExitTable, **budget: Any) -> tuple[int, ...]:
        return exits.allowed(Budget(structured_min_quality=0.4, **budget))

    assert allowed(EXITS) == (15, 30)
    assert allowed(unmeasured(min_quality=0.0)) == (15, 30)
    assert allowed(EXITS, min_quality=0) == (9, 15, 30)
    assert allowed(EXITS, exit_layer=9) == (9,)
    with pytest.raises(InvalidRequestError, match="this server's --structured-min-quality"):
        allowed(EXITS, compute=0.4)


def test_compute_that_no_exit_keeps_is_not_blamed_on_the_servers_floor() -> None:
    with pytest.raises(InvalidRequestError) as error:
        FLOORED.allowed(Budget(compute=0.01))

    assert "--min-quality" not in error.value.message


@given(
    scores=st.lists(st.none() | st.floats(0.0, 1.0), min_size=1, max_size=5),
    min_quality=st.floats(0.0, 1.0),
    is_full_measured=st.booleans(),
)
def test_nobody_is_served_less_than_the_floor_unasked(
    scores: list[float | None], min_quality: float, is_full_measured: bool
) -> None:
    layers = range(1, len(scores) + 2)
    table = ExitTable(
        tuple(
            ExitInfo(exit_layer=e, num_parameters=e, compute=e / len(layers), score=score)
            for e, score in zip(layers, [*scores, 1.0 if is_full_measured else None], strict=True)
        ),
        min_quality,
    )

    allowed = table.allowed(Budget())

    assert allowed == table.layers[-len(allowed) :], "no gaps: nobody is lowered through one"
    assert all(table.scores[e] >= min_quality for e in allowed)


def unmeasured(**options: float) -> ExitTable:
    computes = {9: 0.4, 15: 0.6, 30: 1.0}
    infos = [ExitInfo(exit_layer=e, num_parameters=1, compute=c) for e, c in computes.items()]
    return ExitTable(tuple(infos), **options)  # type: ignore[arg-type]


def test_deadlines_count_from_the_arrival() -> None:
    deadlines = Budget(latency_ms=500, ttft_ms=100, tpot_ms=20).deadlines(10.0)

    assert (deadlines.e2e_s, deadlines.ttft_s, deadlines.tpot_s) == (10.5, 10.1, 0.02)
