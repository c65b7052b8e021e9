"""Probes, version and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from sortserve import __version__
from sortserve.api.openapi import documented
from sortserve.api.replies import StatusReply, VersionReply
from sortserve.api.service import Service
from sortserve.errors import UnavailableError

__all__ = ["operation_routes"]

RETRY_AFTER_S = 5


def operation_routes(service: Service) -> APIRouter:
    """What orchestrators and monitoring ask for."""
    router = APIRouter(tags=["operations"])

    @router.get("/health", **documented(StatusReply, errors=(503,)))
    @router.get("/readyz", **documented(StatusReply, errors=(503,)))
    async def health() -> Response:
        """200 when requests are taken; 503 while loading, draining or after a failure."""
        state = service.worker.state
        return JSONResponse({"status": state}) if state == "ready" else _unavailable(state)

    @router.get("/livez", **documented(StatusReply, errors=(503,)))
    async def livez() -> Response:
        """200 unless the engine has failed, which only a restart can mend."""
        state = service.worker.state
        return _unavailable(state) if state == "failed" else JSONResponse({"status": "alive"})

    @router.get("/version", **documented(VersionReply))
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


def _unavailable(state: str) -> Response:
    error = UnavailableError(f"The server is {state}.", code=state)
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    body = {"status": state, **error.body()}
    return JSONResponse(body, status_code=error.status, headers=headers)
