"""Which names a server answers to, so that no web page reaches it under a name of its own.

A page may point its own name at 127.0.0.1 (DNS rebinding): the browser then takes our answers for
the page's own. The ``Host`` header still carries the page's name.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sortserve.api.http.middleware import outer_headers
from sortserve.api.problems import error_response, shortened
from sortserve.core.errors import InvalidRequestError
from sortserve.telemetry.logs import fields

__all__ = ["HostCheckMiddleware"]

logger = logging.getLogger(__name__)

MISDIRECTED_REQUEST = 421


class HostCheckMiddleware:
    """Refuses requests whose ``Host`` is not one of ours. Who sends none is no browser, and passes.

    Args:
        app: what to guard.
        names: hosts to answer to, beside ``localhost`` and loopback addresses. Ports do not count.
        any_address: also answer to every other IP address: no page can take one for its name.
        cors_allow_origins: whose scripts may read the refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Iterable[str] = (),
        any_address: bool,
        cors_allow_origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._cors_allow_origins = cors_allow_origins
        self._names = {"localhost", *map(_host_of, names)}
        self._any_address = any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 421, or pass on."""
        headers = Headers(scope=scope)
        given = headers.getlist("host") if scope["type"] == "http" else []
        foreign = next((host for host in given if not self._is_ours(_host_of(host))), None)
        if foreign is None:
            await self._app(scope, receive, send)
            return
        logger.info("host refused", extra=fields(host=foreign[:100]))
        error = InvalidRequestError(
            f"Host {shortened(foreign)} is not a name of this server: it answers to "
            f"{', '.join(sorted(self._names))} and addresses. --allowed-hosts takes more names.",
            param="Host",
            code="host_not_allowed",
        )
        added = outer_headers(headers, cors_allow_origins=self._cors_allow_origins)
        response = error_response(error, added)
        response.status_code = MISDIRECTED_REQUEST
        await response(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        if host in self._names:
            return True
        try:
            return ipaddress.ip_address(host).is_loopback or self._any_address
        except ValueError:
            return False


def _host_of(header: str) -> str:
    """``[::1]:8000`` is ``::1``, ``Box.lan.:80`` is ``box.lan``; what is neither stays as it is."""
    text = header.strip().lower()
    parts = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", text)
    if parts is None:
        return text
    address, name = parts.groups()
    return str(address if name is None else name.removesuffix("."))
