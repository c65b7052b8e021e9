"""Probes, version and metrics."""

from __future__ import annotations

from inspect import isawaitable

from fastapi import APIRouter, Request, Response

from sortserve import __version__
from sortserve.api.problems import unavailable_response
from sortserve.api.replies.models import StatusResponse, VersionResponse
from sortserve.api.routes.dependencies import Serving
from sortserve.api.routes.responses import errors
from sortserve.replicas.load import EngineLoad

__all__ = ["router"]

router = APIRouter(tags=["operations"])
"""What orchestrators and monitoring ask for."""


@router.get(
    "/health",
    response_model=StatusResponse,
    response_model_exclude_none=True,
    responses=errors(503),
)
@router.get(
    "/readyz",
    response_model=StatusResponse,
    response_model_exclude_none=True,
    responses=errors(503),
)
async def health(service: Serving) -> StatusResponse | Response:
    """200 when requests are taken; 503 while loading, draining or after a failure."""
    state = service.worker.state
    if state == "ready":
        replicas = service.worker.replica_states
        return StatusResponse(status=state, replicas=None if replicas is None else dict(replicas))
    return unavailable_response(state, f"The server is {state}.")


@router.get(
    "/livez",
    response_model=StatusResponse,
    response_model_exclude_none=True,
    responses=errors(503),
)
async def livez(service: Serving) -> StatusResponse | Response:
    """200 unless the engine has failed, which only a restart can mend."""
    state = service.worker.state
    if state == "failed":
        return unavailable_response(state, f"The server is {state}.")
    return StatusResponse(status="alive")


@router.get("/version", responses=errors(401))
async def version(service: Serving) -> VersionResponse:
    """The server's version, and what its model computes with."""
    return VersionResponse(version=__version__, backend=service.settings.backend)


@router.get("/load", responses=errors(401))
async def load(service: Serving) -> EngineLoad:
    """What this server would tell a router: predicted times per exit, pressure, room, prefixes."""
    return service.worker.load()


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, service: Serving) -> Response:
    """Prometheus series."""
    if service.metrics is None:
        return Response(b"", media_type="text/plain; version=0.0.4")
    rendered = service.metrics.render(request.headers.get("accept"))
    content, content_type = await rendered if isawaitable(rendered) else rendered
    return Response(content, headers={"Content-Type": content_type})
