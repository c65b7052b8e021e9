"""Cache memory is a share of the full request's, as an operator reads it from /metrics."""

from __future__ import annotations

import asyncio
import re

import pytest

from support.http_service import EXITS, Connection, as_json, make_service

FULL = EXITS[-1]


async def pages_held(exit_layer: int) -> float:
    """Pages in use while one request of 41 tokens runs at an exit."""
    service = make_service()
    service.runner.gated = True
    service.runner.permits.release()  # one step: the whole prompt and the first token
    body = {"prompt": "a" * 40, "max_tokens": 9, "stream": True}
    connection = Connection(
        service.app, "/generate", as_json({**body, "budget": {"exit_layer": exit_layer}})
    )
    running = connection.open()
    await connection.wait_for_events(1)

    text = (await service.get("/metrics")).text

    service.runner.open()
    await running
    await asyncio.to_thread(service.worker.stop)
    (value,) = re.findall(r"^sortserve_kv_pages_used\{.*\} (\S+)$", text, re.MULTILINE)
    return float(value)


@pytest.mark.parametrize("exit_layer", EXITS)
async def test_a_request_at_an_exit_holds_its_share_of_the_full_requests_pages(
    exit_layer: int,
) -> None:
    held = await pages_held(exit_layer)

    assert held > 0
    assert held == await pages_held(FULL) * exit_layer / FULL
