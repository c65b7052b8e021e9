"""What a key with a deepest exit is told of the exits: those that it may have, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sortserve.core.api_keys import KeyPolicy, key_digest
from sortserve.core.schedule import DepthSchedule, ScheduleInfo
from support.http_service import HttpService

Make = Callable[..., HttpService]
AUTHORIZED = {"authorization": "Bearer k"}


def policy(**limits: Any) -> KeyPolicy:
    return KeyPolicy(name="alice", digests=(key_digest("k"),), **limits)


async def test_a_key_is_told_of_no_deeper_exit_than_it_may_have(make: Make) -> None:
    service = make(key_policies=[policy(max_exit_layer=4)])

    models = (await service.get("/v1/models", **AUTHORIZED)).json()["data"]
    exits = (await service.get("/exits", **AUTHORIZED)).json()["exits"]

    assert [model["id"] for model in models] == ["tiny", "tiny@2", "tiny@4"]
    assert [model["exits"] for model in models] == [[2, 4]] * 3
    assert [entry["exit_layer"] for entry in exits] == [2, 4]


async def test_a_deeper_exit_does_not_exist_for_a_key(make: Make) -> None:
    service = make(key_policies=[policy(max_exit_layer=4)])

    open_to_it = await service.get("/v1/models/tiny@4", **AUTHORIZED)
    deeper = await service.get("/v1/models/tiny@6", **AUTHORIZED)

    assert (open_to_it.status_code, open_to_it.json()["exits"]) == (200, [2, 4])
    error = deeper.json()["error"]
    assert (deeper.status_code, error["code"]) == (404, "model_not_found")
    assert "[2, 4]" in error["message"]


async def test_a_key_without_a_deepest_exit_is_told_of_all(make: Make) -> None:
    service = make(key_policies=[policy()])

    models = (await service.get("/v1/models", **AUTHORIZED)).json()["data"]
    exits = (await service.get("/exits", **AUTHORIZED)).json()["exits"]

    assert [model["exits"] for model in models] == [[2, 4, 6]] * 4
    assert [entry["exit_layer"] for entry in exits] == [2, 4, 6]


async def test_a_key_whose_exits_are_all_below_the_floor_gets_its_deepest_unasked(
    make: Make,
) -> None:
    service = make(key_policies=[policy(max_exit_layer=2)])

    exits = (await service.get("/exits", **AUTHORIZED)).json()
    reply = await service.post("/generate", {"prompt": "abcdefgh", "max_tokens": 4}, **AUTHORIZED)

    assert [entry["served_unasked"] for entry in exits["exits"]] == [True]
    assert reply.headers["x-exit-layer"] == "2"


async def test_a_schedule_deeper_than_a_key_may_go_is_not_listed(make: Make) -> None:
    service = make(key_policies=[policy(max_exit_layer=4)])
    measured = [
        ScheduleInfo(schedule=DepthSchedule(parts), num_tokens=128, compute=0.6)
        for parts in (((0, 6), (8, 2)), ((0, 4), (8, 2)))
    ]
    table = replace(service.engine.exits, schedules=tuple(measured))
    service.engine.exits = service.worker.exits = table

    schedules = (await service.get("/exits", **AUTHORIZED)).json()["schedules"]

    assert [entry["schedule"] for entry in schedules] == [[[0, 4], [8, 2]]]
