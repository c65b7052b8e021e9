"""The outermost layer: request ids, unexpected errors, one count per request. Pure ASGI."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.api.interfaces import HttpMetrics
from sortserve.api.problems import error_response, shortened
from sortserve.errors import EngineError, InvalidRequestError

__all__ = ["REQUEST_ID_PATTERN", "ContextMiddleware"]

logger = logging.getLogger(__name__)

REQUEST_ID_PATTERN = r"[A-Za-z0-9._:/+=@-]{1,128}"
"""What a client's request id may look like: it goes into logs and reply headers."""
CLIENT_CLOSED_REQUEST = 499
"""The status, as nginx counts it, of a request whose client left before the reply began."""


class ContextMiddleware:
    """Gives each request an id and an end: whatever happens inside, it is answered and counted.

    ``X-Request-Id`` is taken over from the client and echoed on every reply, errors included;
    routes find it in ``scope["state"]["request_id"]``.
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
        given = Headers(scope=scope).get("x-request-id")
        is_valid = given is not None and re.fullmatch(REQUEST_ID_PATTERN, given) is not None
        request_id = given if given is not None and is_valid else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        id_header = (b"x-request-id", request_id.encode("ascii"))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        try:
            if given is not None and not is_valid:
                await error_response(_bad_request_id(given))(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.debug("the client left while it was sending its request")
        except Exception:
            if status != CLIENT_CLOSED_REQUEST:
                raise  # the reply has begun: the server can only cut the connection
            logger.exception("request %s failed", request_id)
            error = EngineError("The server failed on this request.", code="internal_error")
            await error_response(error)(scope, receive, send_with_id)
        finally:
            if self._metrics is not None:
                route = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.http_request(route, scope["method"], status)


def _bad_request_id(given: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"x-request-id={shortened(given)} is not allowed: "
        "1 to 128 letters, digits or characters of ._:/+=@- are.",
        param="x-request-id",
    )
