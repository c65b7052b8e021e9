"""Hundreds of clients at once, good, bad and gone: no 5xx, no lost page, every bad one told why."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

from support.http_service import WAIT_S, Connection, HttpService, as_json

NUM_CLIENTS = 300
Kind = tuple[str, dict[str, Any], str | None]
"""Path, body, and the field to be named in the error, if it is an error."""


def any_request(rng: random.Random) -> Kind:
    chat = {"messages": [{"role": "user", "content": "a" * rng.randint(1, 60)}]}
    text = {"prompt": "a" * rng.randint(1, 60)}
    good: list[Kind] = [
        ("/generate", {**text, "max_tokens": rng.randint(1, 25), "n": rng.randint(1, 3)}, None),
        (
            "/generate",
            {**text, "max_tokens": 9, "budget": {"exit_layer": rng.choice((2, 4, 6))}},
            None,
        ),
        ("/v1/completions", {**text, "stop": "zab", "logprobs": 1}, None),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 20, "model": "tiny@2"}, None),
        ("/v1/chat/completions", {**chat, "max_tokens": 20, "cache_salt": "s"}, None),
    ]
    bad: list[Kind] = [
        ("/generate", {**text, "max_tokens": 10**6}, "max_tokens"),
        ("/generate", {"prompt": "a" * 100_000}, "prompt"),
        ("/generate", {**text, "budget": {"exit_layer": 5}}, "budget.exit_layer"),
        ("/v1/completions", {**text, "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": [0, 10**6]}, "prompt.1"),
        ("/v1/completions", {"prompt": ["a", "a" * 1000]}, "prompt.1"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
    ]
    path, body, param = rng.choice(good if rng.random() < 0.7 else bad)
    return path, {**body, "stream": rng.random() < 0.6}, param


async def one_client(service: HttpService, rng: random.Random) -> None:
    path, body, param = any_request(rng)
    connection = Connection(service.app, path, as_json(body))
    leaves = param is None and rng.random() < 0.4
    task = connection.open()
    if leaves:
        for _ in range(rng.randint(0, 30)):
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            connection.send_fails = True
        connection.leave()
    await task
    if param is not None:
        error = json.loads(connection.content)["error"]
        assert (connection.status, error["param"]) == (400, param)
    elif not leaves:
        assert connection.status == 200
        assert body["stream"] == connection.content.endswith(b"data: [DONE]\n\n")
    else:
        assert connection.status in (None, 200)


async def test_a_storm_of_clients_leaves_the_server_whole(
    make: Callable[..., HttpService],
) -> None:
    service = make(
        engine_options={"max_num_seqs": 16},
        worker_options={"max_num_queued_reqs": 2000, "max_num_queued_tokens": 10**9},
    )
    seeds = range(NUM_CLIENTS)

    await asyncio.gather(*(one_client(service, random.Random(seed)) for seed in seeds))

    assert await service.worker.drain(WAIT_S)
    service.engine.check_invariants()
    assert service.worker.stats().kv_pages_used == 0
    metrics = (await service.get("/metrics")).text
    assert 'status="5' not in metrics
    reasons = {str(report.finish_reason) for report in service.ended.reports}
    assert {"length", "abort"} <= reasons <= {"length", "abort", "stop"}
