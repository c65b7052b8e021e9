"""The client's budget says no to what the server would refuse without knowing the model."""

from __future__ import annotations

from typing import Any

import pytest

from sortserve.core.budget import BUDGET_FIELDS
from sortserve.core.budget import Budget as ServerBudget
from sortserve.core.errors import InvalidRequestError
from sortserve_client import Budget

REFUSED: list[dict[str, Any]] = [
    {"latency_ms": 0},
    {"latency_ms": -5},
    {"ttft_ms": float("nan")},
    {"tpot_ms": float("inf")},
    {"latency_ms": "500"},
    {"latency_ms": True},
    {"compute": 0.0},
    {"compute": 1.01},
    {"min_quality": 2},
    {"min_quality": -0.1},
    {"min_quality": False},
    {"exit_layer": 0},
    {"exit_layer": 1.5},
    {"exit_layer": True},
    {"min_exit_layer": -1},
    {"on_miss": "panic"},
    {"exit_layer": 9, "compute": 0.5},
    {"exit_layer": 9, "min_exit_layer": 3},
    {"exit_layer": 9, "min_quality": 0.5},
    {"ttft_ms": 300, "latency_ms": 200},
    {"schedule": []},
    {"schedule": "0:30"},
    {"schedule": [[1, 30]]},
    {"schedule": [[0, 30], [5]]},
    {"schedule": [[0, 30], [5, 24.0]]},
    {"schedule": [[0, 30], [5, 30]]},
    {"schedule": [[0, 30], [0, 24]]},
    {"schedule": [[0, 0]]},
    {"schedule": [[i, 99 - i] for i in range(65)]},
    {"schedule": [[0, 30]], "exit_layer": 30},
    {"schedule": [[0, 30]], "compute": 0.5},
    {"schedule": [[0, 30]], "min_quality": 0.5},
]
ALLOWED: list[dict[str, Any]] = [
    {},
    {"min_quality": 0},
    {"latency_ms": 800, "ttft_ms": 200, "tpot_ms": 25.5},
    {"compute": 1.0, "min_exit_layer": 12, "min_quality": 0.9, "on_miss": "reject"},
    {"exit_layer": 18, "latency_ms": 800, "on_miss": "truncate"},
    {"schedule": [[0, 30], [32, 27]], "latency_ms": 800},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_a_budget_that_the_server_refuses_is_refused_before_it_is_sent(
    fields: dict[str, Any],
) -> None:
    with pytest.raises(InvalidRequestError) as server:
        ServerBudget(**fields)
    with pytest.raises(ValueError, match="budget") as client:
        Budget(**fields)

    assert server.value.param is not None
    assert server.value.param in str(client.value)


@pytest.mark.parametrize("fields", ALLOWED, ids=str)
def test_a_budget_goes_over_the_wire_as_the_server_reads_it(fields: dict[str, Any]) -> None:
    sent = Budget(**fields).to_json()

    assert sent == fields
    assert ServerBudget.from_mapping(sent) == ServerBudget(**fields)


def test_both_sides_know_the_same_fields() -> None:
    assert set(Budget.__dataclass_fields__) == set(BUDGET_FIELDS)
