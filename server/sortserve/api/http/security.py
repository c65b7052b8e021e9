"""How much may be sent, and what is open to everybody, as pure ASGI middleware.

``BaseHTTPMiddleware`` is avoided everywhere: behind it a disconnect is never seen.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.api.problems import error_response
from sortserve.core.errors import PayloadTooLargeError

__all__ = ["OPEN_PATHS", "BodyLimitMiddleware", "route_path"]

OPEN_PATHS = frozenset({"/health", "/readyz", "/livez", "/metrics"})
"""What probes and Prometheus ask for without a key."""


class BodyLimitMiddleware:
    """Refuses bodies over a limit: by their declared length at once, else when they pass it."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, or pass on with a receive that counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        # A number of many digits is too large too, and int() would refuse to read it.
        if declared.isdecimal() and int(declared[:19]) > self._max_body_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(f"The body is over the limit of {self._max_body_bytes} bytes.")


def route_path(scope: Scope) -> str:
    """The path below the prefix that a reverse proxy may have left in place."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path
