"""Who may ask, and how much: API keys and the body-size limit, as pure ASGI middleware.

``BaseHTTPMiddleware`` is avoided everywhere: behind it a disconnect is never seen.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.api.problems import error_response
from sortserve.core.errors import AuthenticationError, PayloadTooLargeError

__all__ = ["OPEN_PATHS", "ApiKeyMiddleware", "BodyLimitMiddleware", "key_digest", "route_path"]

OPEN_PATHS = frozenset({"/health", "/readyz", "/livez", "/metrics"})
"""What probes and Prometheus ask for without a key."""


def key_digest(key: str) -> str:
    """What stands for a key wherever the key itself is not needed."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeyMiddleware:
    """Lets requests pass that carry one of the keys as ``Authorization: Bearer KEY``.

    Routes find the key's digest in ``scope["state"]["key_digest"]``.

    Args:
        app: what to guard.
        api_keys: the keys.
        open_paths: answered without one, such as pages that ask for the key themselves.
    """

    def __init__(
        self, app: ASGIApp, *, api_keys: Sequence[str], open_paths: AbstractSet[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._open_paths = open_paths
        self._keys = [key.encode() for key in api_keys]
        self._digests = [key_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass on."""
        if scope["type"] != "http" or route_path(scope) in self._open_paths:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        digest = self._digest_of(key.strip()) if scheme.lower() == "bearer" else None
        if digest is not None:
            scope.setdefault("state", {})["key_digest"] = digest
            await self._app(scope, receive, send)
            return
        problem = "The API key is wrong." if key else "An API key is needed."
        error = AuthenticationError(f"{problem} Send it as `Authorization: Bearer KEY`.")
        await error_response(error)(scope, receive, send)

    def _digest_of(self, key: str) -> str | None:
        """Compare with every key, each in constant time, so that timing tells nothing."""
        given = key.encode("latin-1")  # the header's own bytes
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return self._digests[matches.index(True)] if any(matches) else None


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
