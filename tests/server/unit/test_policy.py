"""The depth cap of a step, as pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sortserve.core.errors import ConfigError
from sortserve.scheduling.policies.fair import fair, fair_rates
from sortserve.scheduling.policies.lockstep import lockstep, lockstep_rates
from sortserve.scheduling.policies.table import POLICIES, get_policy
from sortserve.scheduling.policy import DepthClass


def play(
    policy: Callable[[Sequence[DepthClass]], int], costs: dict[int, float], num_steps: int
) -> tuple[list[int], Counter[int]]:
    """Caps chosen over some steps while every class stays busy, and steps each took part in."""
    service = dict.fromkeys(costs, 0.0)
    caps: list[int] = []
    steps: Counter[int] = Counter()
    for _ in range(num_steps):
        cap = policy([DepthClass(e, 1, costs[e], service[e]) for e in costs])
        caps.append(cap)
        for e in costs:
            if e <= cap:
                steps[e] += 1
                service[e] += costs[e]
    return caps, steps


def test_lockstep_always_runs_the_deepest() -> None:
    caps, _ = play(lockstep, {9: 9.0, 30: 30.0}, 5)

    assert caps == [30] * 5


def test_fair_gives_three_shallow_tokens_for_each_deep_one() -> None:
    caps, steps = play(fair, {9: 10.0, 30: 30.0}, 30)

    assert caps[:6] == [30, 9, 9, 30, 9, 9]
    assert steps[9] == 3 * steps[30]


def test_fair_alone_is_lockstep() -> None:
    caps, _ = play(fair, {30: 30.0}, 4)

    assert caps == [30] * 4


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True))
@example([28, 1])
def test_fair_slows_no_class_by_more_than_the_number_of_classes(layers: list[int]) -> None:
    costs = {e: float(e) for e in layers}
    caps, steps = play(fair, costs, 400)

    # The last deep step may not have been made up for yet by the shallow ones that follow it.
    elapsed = sum(costs[cap] for cap in caps) - max(costs.values())
    for e in layers:
        alone = elapsed / costs[e]
        assert steps[e] >= alone / len(layers) - 2


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
def test_predicted_rates_are_those_that_fair_produces(layers: list[int]) -> None:
    costs = {e: float(e) for e in layers}
    caps, steps = play(fair, costs, 2000)

    elapsed = sum(costs[cap] for cap in caps)
    rates = fair_rates(costs)
    for e in layers:
        assert steps[e] / elapsed == pytest.approx(rates[e], rel=0.05)


def test_predicted_rates_of_lockstep_are_the_deepest_ones() -> None:
    assert lockstep_rates({9: 0.01, 30: 0.04}) == {9: 25.0, 30: 25.0}


@pytest.mark.parametrize("name", POLICIES)
def test_the_table_has_each_policy_under_its_own_name(name: str) -> None:
    assert get_policy(name).name == name


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"fastest.*choose one of deadline, fair, lockstep"):
        get_policy("fastest")
