"""What routes ask for in their signatures: the service, and the body as its model."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel

from sortserve.api.bodies.reading import read_body
from sortserve.api.key_depth import KeyExits
from sortserve.api.service import Service
from sortserve.core.api_keys import KeyPolicy

__all__ = ["OpenExits", "Serving", "body_of"]


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(_service)]


async def _open_exits(request: Request, service: Serving) -> KeyExits:
    policy: KeyPolicy | None = getattr(request.state, "key_policy", None)
    most = None if policy is None else policy.max_exit_layer
    return KeyExits.of(service.worker.exits, most)


OpenExits = Annotated[KeyExits, Depends(_open_exits)]
"""What is told of exits: the others are no use to who asks."""


def body_of(model: type[BaseModel]) -> Any:
    """What makes a route's parameter ``body`` a validated ``model``.

    FastAPI's own reading would parse a body before anything bounds it, and on the event loop.
    """

    async def read(request: Request) -> BaseModel:
        service = await _service(request)
        request.state.arrival_s = service.worker.clock()
        return await read_body(
            request,
            model,
            limits=service.limits,
            threads=service.threads,
            max_body_bytes=service.settings.max_body_bytes,
        )

    return Depends(read)
