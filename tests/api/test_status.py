"""``GET /status``: what runs now, and what was done since the start."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sortserve.core.budget import Budget
from sortserve.core.request import EngineStats
from support.http_service import HttpService


async def test_a_fresh_server_has_done_nothing(service: HttpService) -> None:
    status = (await service.get("/status")).json()

    assert (status["status"], status["model"], status["max_model_len"]) == ("ready", "tiny", 256)
    assert (status["num_running"], status["num_waiting"]) == (0, 0)
    assert status["running_by_exit"] == status["tokens_by_exit"] == {"2": 0, "4": 0, "6": 0}
    assert status["budgets"] == {"met": 0, "missed": 0, "rejected": 0}
    assert (status["default_exit_layer"], status["overload_level"]) == (6, 0)


async def test_running_rows_are_told_by_exit(
    service: HttpService, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = EngineStats(
        running_by_exit={2: 2, 6: 1}, num_waiting=3, kv_pages_used=1, kv_pages_total=8
    )
    monkeypatch.setattr(service.worker, "stats", lambda: stats)

    status = (await service.get("/status")).json()

    assert status["running_by_exit"] == {"2": 2, "4": 0, "6": 1}
    assert (status["num_running"], status["num_waiting"]) == (3, 3)
    assert status["kv_cache_usage"] == 0.125


async def test_tokens_and_layers_are_counted_by_exit(service: HttpService) -> None:
    schedule = {"schedule": [[0, 6], [1, 2]]}
    await service.post("/generate", {"prompt": "a", "max_tokens": 3, "budget": schedule})
    await service.ended.wait_for(1)

    status = (await service.get("/status")).json()

    assert status["tokens_by_exit"] == {"2": 2, "4": 0, "6": 1}
    assert (status["layers_run"], status["layers_full"]) == (6 + 2 + 2, 18)


async def test_budgets_are_counted_by_what_became_of_them(service: HttpService) -> None:
    clock = service.engine.clock
    body = {"prompt": "a", "max_tokens": 2}
    await service.post("/generate", body)
    await service.post("/generate", {**body, "budget": {"latency_ms": 1000}})
    clock.tick = 1.0  # type: ignore[attr-defined]
    await service.post("/generate", {**body, "budget": {"latency_ms": 1}})
    clock.tick = 0.0  # type: ignore[attr-defined]
    await service.ended.wait_for(3)

    status = (await service.get("/status")).json()

    assert status["budgets"] == {"met": 1, "missed": 1, "rejected": 0}


async def test_the_floor_of_a_default_budget_is_where_a_newcomer_would_start(
    make: Callable[..., HttpService],
) -> None:
    service = make(default_budget=Budget(exit_layer=4))

    assert (await service.get("/status")).json()["default_exit_layer"] == 4
