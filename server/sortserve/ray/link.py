"""Messages over Ray Serve's handles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from sortserve.core.errors import UnavailableError
from sortserve.ray.registry import directory_of
from sortserve.remote.link import ReplicaLostError
from sortserve.replicas.directory import Directory
from sortserve.replicas.messages import Accepted, Ask, Handover, Item

__all__ = ["RayLink"]

ANSWER_TIMEOUT_S = 60.0
"""Seconds in which a replica must let a request in or refuse it: a grammar may take a while."""
ASK_TIMEOUT_S = 5.0
"""Seconds that a replica gets to answer a question."""


class RayLink:
    """Implements ``Link`` with the handle of the engines' deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.directory: Directory = directory_of(
            handle.deployment_id.app_name, handle.deployment_id.name
        )
        self._generate = handle.options(method_name="generate", stream=True)
        self._ask = handle.options(method_name="ask")

    async def open(self, handover: Handover) -> AsyncGenerator[Item, None]:
        """See ``Link``."""
        key = handover.requests[0].request_id
        self.directory.begin(key)
        response = self._generate.remote(handover)
        items = response.__aiter__()
        wait_s: float | None = ANSWER_TIMEOUT_S
        has_ended = False
        try:
            while True:
                try:
                    item = await asyncio.wait_for(anext(items), wait_s)
                except StopAsyncIteration:
                    break
                wait_s = None
                if isinstance(item, Accepted):
                    exit_layer = item.choices[0][0]
                    self.directory.accept(item.replica_id, key, handover.routed, exit_layer)
                yield item
            has_ended = True
        except (TimeoutError, BackPressureError, DeploymentUnavailableError) as error:
            raise UnavailableError(
                "No replica takes the request now.", code="no_replica", retry_after_s=5.0
            ) from error
        except (RayError, RequestCancelledError) as error:
            raise ReplicaLostError("The replica that worked on this request was lost.") from error
        finally:
            self.directory.end(key)
            if not has_ended:
                response.cancel()

    async def ask(self, ask: Ask, timeout_s: float | None = ASK_TIMEOUT_S) -> Any:
        """See ``Link``; ``timeout_s`` None waits as long as it takes."""
        response = self._ask.remote(ask)
        try:
            return await asyncio.wait_for(_answer(response), timeout_s)
        except (TimeoutError, RayError, BackPressureError, DeploymentUnavailableError) as error:
            with suppress(Exception):
                response.cancel()
            raise ReplicaLostError(f"A replica did not answer: {error!r}.") from error


async def _answer(response: Any) -> Any:
    return await response
