"""Demands become columns once; what has not changed is not taken apart again."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sortserve.scheduling import columns as columns_module
from sortserve.scheduling.columns import Columns, LiveDemands
from sortserve.scheduling.demand import Demand
from support.timed import make_demand, make_timed, timed_request


def some_demand(name: str, rng: random.Random) -> Demand:
    return make_demand(
        name,
        rng.choice([2, 4, 6]),
        due_s=rng.uniform(0.1, 3.0),
        num_pending=rng.choice([1, 300]),
        context_len=rng.choice([0, 200]),
    )


def assert_right(live: LiveDemands) -> None:
    for name, expected in vars(Columns.of(list(live))).items():
        np.testing.assert_array_equal(getattr(live.columns, name), expected, err_msg=name)


@pytest.mark.parametrize("seed", range(10))
def test_columns_are_right_whatever_came_left_and_changed_before(seed: int) -> None:
    rng = random.Random(seed)
    live = LiveDemands()
    for i in range(60):
        demands = list(live)
        match rng.randrange(5):
            case 0:
                demands += [some_demand(f"{i}.{k}", rng) for k in range(rng.randrange(4))]
            case 1 if demands:
                del demands[rng.randrange(len(demands)) :]
            case 2 if demands:
                del demands[rng.randrange(len(demands))]
            case 3:
                rng.shuffle(demands)
            case 4:
                demands = [
                    some_demand(d.request_id, rng) if rng.random() < 0.3 else d for d in live
                ]
        live = LiveDemands.after(live, demands)
        assert list(live) == demands
        if rng.random() < 0.5:  # else nobody asks before the next change
            assert_right(live)
    assert_right(live)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests whose demands have been taken apart, in order."""
    names, plain = list[str](), columns_module._ROW

    def row(demand: Demand) -> object:
        names.append(demand.request_id)
        return plain(demand)

    monkeypatch.setattr(columns_module, "_ROW", row)
    return names


def test_what_is_known_of_a_demand_is_not_found_again(taken: list[str]) -> None:
    rng = random.Random(0)
    a, b, c = (some_demand(name, rng) for name in "abc")

    first = LiveDemands([a, b])
    assert_of(first, taken, {"a", "b"})
    assert LiveDemands.after(first, [a, b]) is first
    assert_of(LiveDemands.after(first, [b, c]), taken, {"c"})
    later = LiveDemands.after(first, [a])  # nobody asks for its columns
    assert_of(LiveDemands.after(later, [a, c, b]), taken, {"c"})


def assert_of(live: LiveDemands, taken: list[str], names: set[str]) -> None:
    taken.clear()
    assert len(live.columns.due_s) == len(live)
    assert set(taken) == names


def test_policy_and_desk_share_the_columns_of_a_step(taken: list[str]) -> None:
    timed = make_timed()
    timed.arrive(timed_request("a", latency_ms=5000))
    timed.step()
    taken.clear()

    timed.step()  # the policy asks who should go shallower
    timed.arrive(timed_request("b", latency_ms=5000))  # and the desk, whether there is room

    assert taken == ["a"]
