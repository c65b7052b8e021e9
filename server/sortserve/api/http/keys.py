"""Who may ask: API keys and their limits, as pure ASGI middleware."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.admission.key_ledger import KeyLedger
from sortserve.api.http.security import OPEN_PATHS, route_path
from sortserve.api.problems import error_response
from sortserve.core.api_keys import KeyPolicy
from sortserve.core.errors import AuthenticationError, RateLimitError

__all__ = ["FREE_METHODS", "ApiKeyMiddleware"]

FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods of requests that no limit counts: they ask how things stand, and generate nothing."""


class ApiKeyMiddleware:
    """Lets requests pass that carry one of the keys as ``Authorization: Bearer KEY``.

    What a key may do at once and in a minute is looked at here, before a byte of the body is read,
    and a place is given back when the reply is over, however it ends. Routes find the key's digest,
    its policy and, of what is counted, its ``KeyUse`` in ``scope["state"]``, as ``key_digest``,
    ``key_policy`` and ``key_use``.

    Args:
        app: what to guard.
        keys: the books.
        open_paths: answered without one, such as pages that ask for the key themselves.
    """

    def __init__(
        self, app: ASGIApp, *, keys: KeyLedger, open_paths: AbstractSet[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 429, or pass on."""
        if scope["type"] != "http" or route_path(scope) in self._open_paths:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        # latin-1: the header's own bytes
        found = self._keys.find(key.strip().encode("latin-1")) if key.strip() else None
        if found is None or scheme.lower() != "bearer":
            problem = "The API key is wrong." if key else "An API key is needed."
            error = AuthenticationError(f"{problem} Send it as `Authorization: Bearer KEY`.")
            await error_response(error)(scope, receive, send)
            return
        digest, policy = found
        scope.setdefault("state", {}).update(key_digest=digest, key_policy=policy)
        await self._admit(policy, scope, receive, self._with_limits(policy, send))

    async def _admit(self, policy: KeyPolicy, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in FREE_METHODS:
            await self._app(scope, receive, send)
            return
        try:
            use = self._keys.begin(policy)
        except RateLimitError as error:
            await error_response(error)(scope, receive, send)
            return
        scope["state"]["key_use"] = use
        try:
            await self._app(scope, receive, send)
        finally:
            use.close()

    def _with_limits(self, policy: KeyPolicy, send: Send) -> Send:
        """A ``send`` whose reply says what the key has left when its headers leave."""

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._keys.state(policy))
            await send(message)

        return send_with_limits
