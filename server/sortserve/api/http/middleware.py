"""The outer layers: request ids, one count per request, HEAD, unexpected errors. Pure ASGI."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.api.generation import REPLY_HEADERS
from sortserve.api.interfaces import HttpMetrics
from sortserve.api.problems import error_response
from sortserve.core.errors import EngineError

__all__ = [
    "REQUEST_ID_PATTERN",
    "ContextMiddleware",
    "ErrorMiddleware",
    "HeadMiddleware",
    "outer_headers",
    "outer_layers",
]

logger = logging.getLogger(__name__)

REQUEST_ID_PATTERN = r"[A-Za-z0-9._:/+=@-]{1,128}"
"""What a client's request id may look like: it goes into logs and reply headers."""
CLIENT_CLOSED_REQUEST = 499
"""The status, as nginx counts it, of a request whose client left before the reply began."""
RATE_LIMIT_PARTS = ("limit", "remaining", "reset")
EXPOSED_HEADERS = (
    *("X-Request-Id", "Retry-After", "X-Should-Retry", "Allow", "WWW-Authenticate"),
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in RATE_LIMIT_PARTS),
    *REPLY_HEADERS,
)
"""Reply headers that scripts of other origins may read."""


def outer_layers(
    *,
    metrics: HttpMetrics | None = None,
    root_path: str = "",
    cors_allow_origins: Sequence[str] = (),
) -> list[Middleware]:
    """What stands around every reply, from the outside in.

    Errors are answered below CORS, whatever raises them: a browser shows its script no reply that
    lacks the headers, and the script would not learn what is wrong.
    """
    layers = [
        Middleware(ContextMiddleware, metrics=metrics, root_path=root_path),
        Middleware(HeadMiddleware),
    ]
    if cors_allow_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=cors_allow_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )
        )
    return [*layers, Middleware(ErrorMiddleware)]


def outer_headers(request: Headers, *, cors_allow_origins: Sequence[str]) -> dict[str, str]:
    """What the outer layers add to a reply, for one that is written before they are reached.

    Args:
        request: the headers of the request, as far as they have come.
        cors_allow_origins: whose scripts may read the reply.
    """
    headers = {"X-Request-Id": _request_id(request)}
    origin = request.get("origin")
    if origin is not None and cors_allow_origins:
        headers["Vary"] = "Origin"
        if origin in cors_allow_origins or "*" in cors_allow_origins:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = ", ".join(EXPOSED_HEADERS)
    return headers


def _request_id(request: Headers) -> str:
    given = request.get("x-request-id", "")
    return given if re.fullmatch(REQUEST_ID_PATTERN, given) else uuid.uuid4().hex


class ContextMiddleware:
    """Gives each request an id and an end: every reply carries the id and is counted.

    ``X-Request-Id`` is taken over from the client if it looks like one, else the request gets an
    id of our own. Routes find it in ``scope["state"]["request_id"]``.
    """

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics | None, root_path: str = "") -> None:
        self._app = app
        self._metrics = metrics
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = scope.get("root_path") or self._root_path
        status = CLIENT_CLOSED_REQUEST
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        id_header = (b"x-request-id", request_id.encode("ascii"))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.debug("the client left while it was sending its request")
        finally:
            if self._metrics is not None:
                route = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.http_request(route, scope["method"], status)


class HeadMiddleware:
    """Answers ``HEAD`` as ``GET`` without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, ``HEAD`` in the form of ``GET``."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        # A copy: the server reads its own scope to know that no body may follow.
        as_get = {**scope, "method": "GET"}

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        try:
            await self._app(as_get, receive, send_head)
        finally:
            scope["route"] = as_get.get("route")


class ErrorMiddleware:
    """Answers what nobody expected with a 500 that tells nothing of the inside; the log has it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and catch."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            raise
        except Exception:
            if scope["type"] != "http" or has_begun:
                raise  # the server can only cut the connection
            logger.exception("request %s failed", scope["state"]["request_id"])
            error = EngineError("The server failed on this request.", code="internal_error")
            await error_response(error)(scope, receive, send)
