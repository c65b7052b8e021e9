"""What is worked out once for all who come between two steps: the same as worked out anew."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from sortserve.admission.forecast import forecast
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.admission.play import stays_of
from sortserve.admission.room import Room
from sortserve.admission.seen import Seen
from sortserve.core.budget import Deadlines
from sortserve.core.slabs import Slabs
from sortserve.cost.model import CostModel
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.demand_table import DemandTable
from sortserve.scheduling.policies.table import get_policy
from sortserve.scheduling.policy import MOST_STEPS
from support.timed import COSTS, MODEL, make_demand

EXITS = (2, 4, 6)
WORTH = {2: 0.4, 4: 0.7, 6: 1.0}


ROOM = Room(num_slots=4, num_pages=300, num_free_pages=200, block_size=4, slabs=Slabs(2))


def some_demand(name: str, rng: random.Random) -> Demand:
    exit_layer = rng.choice(EXITS)
    demand = make_demand(
        name,
        exit_layer,
        due_s=rng.uniform(0.1, 3.0),
        gap_s=rng.uniform(0.05, 1.0),
        floor_layer=rng.choice([e for e in EXITS if e <= exit_layer]),
        num_pending=rng.choice([1, 1, 300]),
        context_len=rng.choice([0, 200]),
    )
    return replace(demand, is_waiting=rng.random() < 0.3)


def load_of(seen: Seen, now: float) -> Load:
    demands, columns, room, seen_s = seen.all()
    policy = get_policy("deadline")
    return Load(
        now=now,
        demands=demands,
        columns=columns,
        room=room,
        seen_s=min(seen_s, now),
        policy=policy,
        worth=WORTH,
    )


def ask(outlook: Outlook, rng: random.Random) -> object:
    newcomer = Newcomer(
        num_prompt_tokens=rng.choice([10, 500]),
        num_output_tokens=50,
        arrival_s=outlook.load.now,
        deadlines=Deadlines(e2e_s=outlook.load.now + rng.uniform(0.1, 5.0)),
        floor_layer=2,
    )
    return forecast(rng.choice(EXITS), newcomer, outlook)


@pytest.mark.parametrize("seed", range(8))
def test_a_forecast_is_the_same_whatever_was_asked_before(seed: int) -> None:
    """While time goes on, requests enter, steps end, and the cost model becomes another."""
    rng, seen, model, now = random.Random(seed), Seen(), MODEL, 0.0
    outlook = Outlook(load_of(seen, now), model, (2,))
    for i in range(60):
        now += rng.expovariate(10.0)
        match rng.randrange(6):
            case 0:
                some = tuple(some_demand(f"{i}.{k}", rng) for k in range(rng.randrange(9)))
                seen.show(some, as_of_s=now)
            case 1:
                seen.enter(some_demand(str(i), rng))
            case 2:
                model = CostModel(model.small, model.large, rng.uniform(1.0, 1.5))
        load, also, question = load_of(seen, now), rng.choice([(2,), (2, 4), EXITS]), i
        outlook = outlook.at(load, model, also)

        anew = Outlook(replace(load, columns=None), model, also)
        assert ask(outlook, random.Random(question)) == ask(anew, random.Random(question))


def test_what_has_passed_of_the_step_under_way_counts_once() -> None:
    """Nothing of it has been taken off what the requests need, so they begin where it began."""
    seen = Seen()
    seen.show((make_demand("row", 6, due_s=1.0),), as_of_s=2.0)

    def ahead_s(now: float) -> float:
        return Outlook(load_of(seen, now), MODEL).ahead_s

    step_s = COSTS.decode_s(6, 10) * MODEL.safety
    assert ahead_s(2.0) == 0.0
    assert ahead_s(2.0 + step_s / 2) == pytest.approx(-step_s / 2)
    assert ahead_s(1e3) == pytest.approx(-2 * (1 + MOST_STEPS) * step_s, rel=0.01), "it is held up"


def test_an_idle_machine_begins_when_it_has_done_what_it_does_for_nobody() -> None:
    load = replace(load_of(Seen(), 2.0), busy_until_s=2.5)

    assert Outlook(load, MODEL).ahead_s == pytest.approx(0.5)


def test_a_newcomer_has_the_same_chance_whenever_it_comes_during_a_step() -> None:
    seen = Seen()
    seen.show((make_demand("row", 6, due_s=0.02, num_left=40),), as_of_s=0.0)

    def loss(now: float, latency_s: float) -> float | None:
        newcomer = Newcomer(
            num_prompt_tokens=50,
            num_output_tokens=5,
            arrival_s=now,
            deadlines=Deadlines(e2e_s=now + latency_s),
            floor_layer=6,
        )
        return forecast(6, newcomer, Outlook(load_of(seen, now), MODEL)).loss

    step_s = COSTS.decode_s(6, 10)
    for latency_s in (0.02, 0.1, 1.0):
        found = {loss(share * step_s, latency_s) for share in (0.0, 0.3, 0.6, 0.9)}
        assert found == {None if latency_s == 0.02 else 0.0}


def test_what_is_seen_is_the_same_object_until_something_changes() -> None:
    rng, seen = random.Random(0), Seen()
    seen.show((some_demand("a", rng),))
    before = seen.all()
    assert all(a is b for a, b in zip(before, seen.all(), strict=True))

    seen.enter(some_demand("b", rng))
    assert [d.request_id for d in seen.all()[0]] == ["a", "b"]
    seen.enter(some_demand("b", rng))
    assert [d.request_id for d in seen.all()[0]] == ["a", "b"]
    seen.show((some_demand("a", rng), some_demand("b", rng)), taken=["b"])
    assert [d.request_id for d in seen.all()[0]] == ["a", "b"]


@pytest.mark.parametrize("seed", range(30))
def test_one_demand_more_is_the_same_as_a_table_of_all(seed: int) -> None:
    rng = random.Random(seed)
    demands = [some_demand(f"r{i}", rng) for i in range(rng.randint(0, 20))]
    costs = StepCosts(MODEL, num_rows=4, chunk=16, safety=1.1)

    grown = DemandTable.of(demands[:-1], costs, EXITS)
    if demands:
        grown = grown.plus_one(demands[-1], costs)

    whole = DemandTable.of(demands, costs, EXITS)
    for name, expected in vars(whole).items():
        np.testing.assert_allclose(vars(grown)[name], expected, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(20))
def test_what_all_take_is_what_each_one_takes(seed: int) -> None:
    rng = random.Random(seed)
    demands = [some_demand(f"r{i}", rng) for i in range(12)]
    load = Load(now=0.0, demands=demands, policy=get_policy("deadline"), room=ROOM)
    queue = Outlook(load, MODEL, also=EXITS).queue
    stays = stays_of(demands, queue.columns, ROOM, queue.costs, queue.paces)

    for i, demand in enumerate(demands):
        alone = queue.stay_of(demand)
        work_s = 0.0 if demand.is_decoding else alone.work_s
        held = demand.context_len + demand.num_pending
        assert stays[i].request_id == demand.request_id
        assert stays[i].pages == ROOM.pages(held, demand.exit_layer)
        assert stays[i].last_pages == ROOM.pages(held + demand.num_left, demand.exit_layer)
        assert stays[i].block_pages == alone.block_pages
        assert stays[i].lasts_s == pytest.approx(alone.lasts_s)
        assert stays[i].work_s == pytest.approx(work_s)
