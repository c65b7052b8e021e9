from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from support.http_service import HttpService, make_service


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., HttpService]]:
    """Makes services; their workers end with the test."""
    services: list[HttpService] = []

    def make(**options: Any) -> HttpService:
        services.append(make_service(**options))
        return services[-1]

    yield make
    for service in services:
        service.runner.open()
        await asyncio.to_thread(service.worker.stop)


@pytest.fixture
async def service(make: Callable[..., HttpService]) -> HttpService:
    return make()


@pytest.fixture(scope="module")
def shared() -> Iterator[HttpService]:
    """One service for all tests of a module that leave nothing behind."""
    service = make_service()
    yield service
    service.worker.stop()
