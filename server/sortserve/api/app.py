"""The HTTP service as one ASGI application."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from sortserve import __version__
from sortserve.api.docs import docs_routes
from sortserve.api.interfaces import HttpMetrics, Tokenizer
from sortserve.api.middleware import ContextMiddleware
from sortserve.api.openapi import install_openapi
from sortserve.api.problems import http_exception_response, sortserve_error_response
from sortserve.api.routes.native import native_routes
from sortserve.api.routes.openai import openai_routes
from sortserve.api.routes.operations import operation_routes
from sortserve.api.security import ApiKeyMiddleware, BodyLimitMiddleware
from sortserve.api.service import Service
from sortserve.api.settings import ApiSettings
from sortserve.engine.worker import EngineWorker
from sortserve.errors import SortserveError

__all__ = ["create_app"]


def create_app(
    worker: EngineWorker,
    tokenizer: Tokenizer,
    settings: ApiSettings,
    metrics: HttpMetrics | None = None,
) -> FastAPI:
    """The application over a worker.

    Starting and draining the worker is the caller's: the application only submits to it.

    Args:
        worker: runs the engine.
        tokenizer: of the served checkpoint.
        settings: names, limits, keys.
        metrics: told about requests, and rendered at ``/metrics``.
    """
    app = FastAPI(
        title="sortserve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.enable_docs else None,
        redirect_slashes=False,
    )
    service = Service(worker, tokenizer, settings, metrics)
    app.include_router(native_routes(service))
    app.include_router(openai_routes(service))
    app.include_router(operation_routes(service))
    if settings.enable_docs:
        app.include_router(docs_routes())
        install_openapi(app, settings)
    app.add_exception_handler(SortserveError, sortserve_error_response)
    app.add_exception_handler(HTTPException, http_exception_response)
    _add_middleware(app, settings, metrics)
    return app


def _add_middleware(app: FastAPI, settings: ApiSettings, metrics: HttpMetrics | None) -> None:
    """From the inside out: body limit, keys, CORS (its preflights carry no key), context."""
    app.add_middleware(BodyLimitMiddleware, max_body_bytes=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=settings.api_keys)
    if settings.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(ContextMiddleware, metrics=metrics, root_path=settings.root_path)
