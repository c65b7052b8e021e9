"""A crowd that comes at once is judged one by one: what else the event loop does goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from support.http_service import HttpService

NUM_CLIENTS = 40


async def test_a_crowd_does_not_hold_up_the_loop(
    make: Callable[..., HttpService], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()
    submit, num_turns, judged_in = service.worker.submit, 0, []

    def noting_submit(*args: Any, **kwargs: Any) -> Any:
        judged_in.append(num_turns)
        return submit(*args, **kwargs)

    monkeypatch.setattr(service.worker, "submit", noting_submit)
    body = {"prompt": "a", "max_tokens": 1}
    crowd = [asyncio.ensure_future(service.post("/generate", body)) for _ in range(NUM_CLIENTS)]
    while not all(task.done() for task in crowd):
        num_turns += 1
        await asyncio.sleep(0)

    assert {(await task).status_code for task in crowd} == {200}
    assert len(judged_in) == NUM_CLIENTS
    assert len(set(judged_in)) == NUM_CLIENTS, "two in one turn of the loop"


async def test_sequences_of_one_request_are_judged_without_others_between(
    make: Callable[..., HttpService], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()
    submit, judged = service.worker.submit, []

    def noting_submit(request: Any, *args: Any, **kwargs: Any) -> Any:
        judged.append(request.request_id.split(".")[0])
        return submit(request, *args, **kwargs)

    monkeypatch.setattr(service.worker, "submit", noting_submit)
    bodies = [{"prompt": "a", "max_tokens": 1, "n": 3, "request_id": f"r{i}"} for i in range(4)]
    await asyncio.gather(*(service.post("/generate", body) for body in bodies))

    assert judged == [f"r{i}" for i in range(4) for _ in range(3)]
