"""Probes, version and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from sortserve import __version__
from sortserve.api.openapi import documented
from sortserve.api.problems import unavailable_response
from sortserve.api.replies.models import StatusResponse, VersionResponse
from sortserve.api.service import Service

__all__ = ["operation_routes"]


def operation_routes(service: Service) -> APIRouter:
    """What orchestrators and monitoring ask for."""
    router = APIRouter(tags=["operations"])

    @router.get("/health", **documented(StatusResponse, errors=(503,)))
    @router.get("/readyz", **documented(StatusResponse, errors=(503,)))
    async def health() -> Response:
        """200 when requests are taken; 503 while loading, draining or after a failure."""
        state = service.worker.state
        if state == "ready":
            return JSONResponse({"status": state})
        return unavailable_response(state, f"The server is {state}.")

    @router.get("/livez", **documented(StatusResponse, errors=(503,)))
    async def livez() -> Response:
        """200 unless the engine has failed, which only a restart can mend."""
        state = service.worker.state
        if state == "failed":
            return unavailable_response(state, f"The server is {state}.")
        return JSONResponse({"status": "alive"})

    @router.get("/version", **documented(VersionResponse))
    async def version() -> dict[str, Any]:
        """The server's version."""
        return {"version": __version__}

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus series."""
        if service.metrics is None:
            return Response(b"", media_type="text/plain; version=0.0.4")
        content, content_type = service.metrics.render(request.headers.get("accept"))
        return Response(content, headers={"Content-Type": content_type})

    return router
