"""The HTTP service as one ASGI application."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sortserve import __version__
from sortserve.admission.key_ledger import KeyLedger
from sortserve.api.http.keys import ApiKeyMiddleware
from sortserve.api.http.middleware import outer_layers
from sortserve.api.http.security import OPEN_PATHS, BodyLimitMiddleware, route_path
from sortserve.api.http.tracing import HttpTracer, TracingMiddleware
from sortserve.api.interfaces import EngineClient, HttpMetrics, Tokenizer
from sortserve.api.openapi import install_openapi
from sortserve.api.problems import (
    http_exception_response,
    sortserve_error_response,
    unavailable_response,
    validation_response,
)
from sortserve.api.routes import docs, native, openai, operations, playground, responses_api, status
from sortserve.api.service import Service
from sortserve.api.settings import ApiSettings
from sortserve.core.errors import SortserveError
from sortserve.telemetry.totals import Totals

__all__ = ["create_app", "create_loading_app"]

# FastAPI's newer versions trace by themselves where the process or the environment has any
# provider, and tell of the bodies that they refuse. Older ones ignore the argument.
_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(
    worker: EngineClient,
    tokenizer: Tokenizer,
    settings: ApiSettings,
    metrics: HttpMetrics | None = None,
    totals: Totals | None = None,
    keys: KeyLedger | None = None,
    tracer: HttpTracer | None = None,
) -> FastAPI:
    """The application over a worker.

    Starting and draining the worker is the caller's: the application only submits to it.

    Args:
        worker: runs the engine, or asks those that do.
        tokenizer: of the served checkpoint.
        settings: names, limits, keys.
        metrics: told about requests, and rendered at ``/metrics``.
        totals: an observer of the worker's engine, for ``/status``.
        keys: who may ask; None: those of the settings, and everybody if there are none.
        tracer: makes the spans of requests; None: nothing is traced.
    """
    if keys is None and settings.key_policies:
        keys = KeyLedger(settings.key_policies)
    app = FastAPI(
        title="sortserve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.enable_docs else None,
        redirect_slashes=False,
        middleware=_layers(settings, metrics, keys, tracer),
        telemetry=_NO_TELEMETRY,
    )
    app.state.service = Service(worker, tokenizer, settings, metrics, totals or Totals())
    routers = (
        *(native.router, openai.router, responses_api.router),
        *(operations.router, status.router),
    )
    for router in routers:
        app.include_router(router)
    if settings.enable_docs:
        app.include_router(docs.router)
        install_openapi(app, routers, settings, needs_key=keys is not None)
    if settings.playground:
        app.include_router(playground.router)
    app.add_exception_handler(SortserveError, sortserve_error_response)
    app.add_exception_handler(RequestValidationError, validation_response)
    app.add_exception_handler(HTTPException, http_exception_response)
    return app


def create_loading_app(
    *, cors_allow_origins: Sequence[str] = (), root_path: str = "", with_playground: bool = False
) -> ASGIApp:
    """What answers while the model loads: alive, not ready, and a page that waits for more."""
    pages = playground.PATHS if with_playground else frozenset[str]()
    app: ASGIApp = partial(_answer_while_loading, pages)
    layers = outer_layers(cors_allow_origins=cors_allow_origins, root_path=root_path)
    for layer in reversed(layers):
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app


async def _answer_while_loading(
    pages: AbstractSet[str], scope: Scope, receive: Receive, send: Send
) -> None:
    response: Response
    path = route_path(scope)
    if path in pages and scope["method"] == "GET":
        response = await playground.page_at(Request(scope), path)
    elif path.endswith("/livez"):  # a proxy's prefix may stand before it
        response = JSONResponse({"status": "alive"})
    else:
        response = unavailable_response("loading", "The model is still loading. Come back soon.")
    await response(scope, receive, send)


def _layers(
    settings: ApiSettings,
    metrics: HttpMetrics | None,
    keys: KeyLedger | None,
    tracer: HttpTracer | None,
) -> list[Middleware]:
    """From the outside in; CORS comes before the keys, as its preflights carry none."""
    layers = outer_layers(
        metrics=metrics,
        root_path=settings.root_path,
        cors_allow_origins=settings.cors_allow_origins,
    )
    if keys is not None:
        pages = (docs.PATHS if settings.enable_docs else frozenset()) | (
            playground.PATHS if settings.playground else frozenset()
        )
        layers.append(Middleware(ApiKeyMiddleware, keys=keys, open_paths=OPEN_PATHS | pages))
    if tracer is not None:
        layers.append(Middleware(TracingMiddleware, tracer=tracer))
    return [*layers, Middleware(BodyLimitMiddleware, max_body_bytes=settings.max_body_bytes)]
