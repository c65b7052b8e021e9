"""What a connection may take, and the replies to what takes more: the application is not asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sortserve.api.http.middleware import outer_headers
from sortserve.api.http.security import OPEN_PATHS
from sortserve.api.problems import error_response
from sortserve.core.errors import (
    EngineError,
    InvalidRequestError,
    SortserveError,
    UnavailableError,
)

__all__ = [
    "MAX_PIPELINED",
    "ConnectionLimits",
    "Refusal",
    "headers_too_large",
    "our_failure",
    "probes_only",
    "too_many_connections",
    "too_many_pipelined",
]


MAX_PIPELINED = 16
"""Requests that may wait on one connection for the answer to an earlier one."""


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What one client may send and hold. Times are in seconds."""

    max_connections: int = 1000
    max_num_headers: int = 200
    """Header fields of one request, trailers included."""
    max_header_bytes: int = 64 << 10
    """Request line and header fields of one request together."""
    keep_alive_s: float = 75.0
    """From one request to the next, and from the connection to the first."""
    header_timeout_s: float = 10.0
    """From the first byte of a request to the end of its headers."""
    body_timeout_s: float = 60.0
    """From the end of the headers to the end of the body."""
    write_timeout_s: float = 60.0
    """For which an answer may lie unread."""


OURS: Mapping[HTTPStatus, type[SortserveError]] = {
    HTTPStatus.INTERNAL_SERVER_ERROR: EngineError,
    HTTPStatus.SERVICE_UNAVAILABLE: UnavailableError,
}
"""Errors that are none of the client's mistakes."""


@dataclass(frozen=True)
class Refusal:
    """Why a connection is refused."""

    status: HTTPStatus
    code: str
    message: str

    def reply(
        self,
        request: Headers,
        *,
        default_headers: Sequence[tuple[bytes, bytes]],
        cors_allow_origins: Sequence[str],
    ) -> bytes:
        """The whole reply as it goes over the wire.

        Args:
            request: what has come of the request's headers.
            default_headers: the server's own, of every reply.
            cors_allow_origins: origins that browsers may call from.
        """
        kind = OURS.get(self.status, InvalidRequestError)
        added = outer_headers(request, cors_allow_origins=cors_allow_origins)
        response = error_response(kind(self.message, code=self.code), added)
        if self.status == HTTPStatus.REQUEST_TIMEOUT:  # it may be faster next time
            del response.headers["x-should-retry"]
        headers = [*default_headers, *response.raw_headers, (b"connection", b"close")]
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}".encode()]
        lines += [name + b": " + value for name, value in headers]
        return b"\r\n".join([*lines, b"", bytes(response.body)])


def headers_too_large(limits: ConnectionLimits) -> Refusal:
    """A request has more than is allowed before its body."""
    return Refusal(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        "headers_too_large",
        f"The request line and headers are over the limit of {limits.max_num_headers} fields "
        f"and {limits.max_header_bytes} bytes.",
    )


def too_many_pipelined() -> Refusal:
    """More requests than ``MAX_PIPELINED`` wait behind each other."""
    return Refusal(
        HTTPStatus.BAD_REQUEST,
        "too_many_pipelined",
        f"More than {MAX_PIPELINED} requests wait on this connection.",
    )


def too_many_connections(cap: int) -> Refusal:
    """The server has no room for the connection."""
    message = f"The server has its --max-connections={cap} open already. Come back soon."
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too_many_connections", message)


def our_failure() -> Refusal:
    """The server has failed while a request came."""
    message = "The server failed on this request."
    return Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", message)


def probes_only(app: ASGIApp, cap: int, cors_allow_origins: Sequence[str]) -> ASGIApp:
    """The application for a connection over the cap."""
    refusal = too_many_connections(cap)
    error = UnavailableError(refusal.message, code=refusal.code)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "OPTIONS" or any(scope["path"].endswith(path) for path in OPEN_PATHS):
            await app(scope, receive, send)  # a browser shows no error if its preflight fails
            return
        added = outer_headers(Headers(scope=scope), cors_allow_origins=cors_allow_origins)
        await error_response(error, added)(scope, receive, send)

    return answer
