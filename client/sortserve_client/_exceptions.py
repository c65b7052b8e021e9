"""Every error the client raises, in one tree: one class for each ``except`` a caller would write.

    SortserveError
    ├── APIConnectionError            no answer came: refused, reset, name not found
    │   └── APITimeoutError           no answer came in time
    ├── APIStatusError                the server answered with an error status
    │   ├── BadRequestError           400, 422  a field is wrong; ``param`` names it
    │   ├── AuthenticationError       401       no API key, or a wrong one
    │   │   └── PermissionDeniedError 403       the key may not have that
    │   ├── NotFoundError             404       unknown model or route
    │   ├── PayloadTooLargeError      413       the body is over the server's limit
    │   ├── OverloadedError           429       over a limit; ``retry_after_s`` says until when
    │   │   ├── BudgetUnattainableError         no allowed exit fits the budget now
    │   │   └── RateLimitError                  the key is over a limit of its own
    │   ├── UnavailableError          503       loading or draining
    │   └── ServerError               other 5xx the server's fault
    ├── InvalidResponseError          an answer that is not what the protocol says
    └── StreamError                   a stream broke after it had begun; ``partial`` has the rest

Mistakes that are visible before anything is sent (two prompts, a negative budget) are plain
``ValueError`` and ``TypeError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sortserve_client._types import Generation

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BudgetUnattainableError",
    "InvalidResponseError",
    "NotFoundError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "RateLimitError",
    "ServerError",
    "SortserveError",
    "StreamError",
    "UnavailableError",
    "status_error_class",
]


class SortserveError(Exception):
    """Base of every error of this client."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class APIConnectionError(SortserveError):
    """No answer came from the server.

    Attributes:
        sent: False if the server cannot have seen the request: there was no connection, or it was
            refused before its first byte. True if it may have.
        transient: False if the same request could never be sent, so that trying again is no use.
    """

    def __init__(self, message: str, *, sent: bool = True, transient: bool = True) -> None:
        super().__init__(message)
        self.sent = sent
        self.transient = transient


class APITimeoutError(APIConnectionError):
    """No answer came within the client's timeout."""


class APIStatusError(SortserveError):
    """The server answered with an error status.

    Attributes:
        status: HTTP status.
        code: the server's short name of the error, such as ``queue_full``.
        param: dotted path of the field that is wrong, such as ``budget.latency_ms``.
        type: the server's class of errors, such as ``invalid_request_error``.
        request_id: what to quote when asking the operator about it.
        retry_after_s: how long the server asks to wait, in seconds.
        body: the decoded JSON body, or the text if it was not JSON.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        body: Any = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.type = type
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.body = body

    def __str__(self) -> str:
        request = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.status}: {self.message}{request}"


class BadRequestError(APIStatusError):
    """A field is missing, unknown, or has a value that is not allowed; ``param`` names it."""


class AuthenticationError(APIStatusError):
    """The API key is missing or wrong."""


class PermissionDeniedError(AuthenticationError):
    """The API key may not have what was asked for, such as an exit deeper than its own."""


class NotFoundError(APIStatusError):
    """The server has no such model or route."""


class PayloadTooLargeError(APIStatusError):
    """The request body is over the server's limit."""


class OverloadedError(APIStatusError):
    """The server's queue is over a limit; ``retry_after_s`` says when to come back."""


class BudgetUnattainableError(OverloadedError):
    """No allowed exit fits the budget now, and the budget said ``on_miss="reject"``."""


class RateLimitError(OverloadedError):
    """The API key is over a limit of its own, which the message names."""


class UnavailableError(APIStatusError):
    """The server is loading or draining."""


class ServerError(APIStatusError):
    """The server failed; the request is lost through no fault of the caller."""


class InvalidResponseError(SortserveError):
    """The answer is not what the protocol says: most likely not a sortserve server."""


class StreamError(SortserveError):
    """A stream broke after it had begun.

    The server reported an error inside the stream, the connection was lost, or the caller asked a
    stream that it had closed early for its result.

    Attributes:
        partial: what had arrived before, or None if that was nothing.
        code, param, type: of the server's error, if it sent one.
        request_id: what to quote when asking the operator about it.
    """

    def __init__(
        self,
        message: str,
        *,
        partial: Generation | None = None,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.partial = partial
        self.code = code
        self.param = param
        self.type = type
        self.request_id = request_id


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: PayloadTooLargeError,
    422: BadRequestError,
    429: OverloadedError,
    503: UnavailableError,
}
_BY_CODE: dict[str, type[APIStatusError]] = {
    "budget_unattainable": BudgetUnattainableError,
    "rate_limit_exceeded": RateLimitError,
}


def status_error_class(status: int, code: str | None) -> type[APIStatusError]:
    """The class for an HTTP status and the ``code`` of the error body."""
    if code in _BY_CODE:
        return _BY_CODE[code]
    return _BY_STATUS.get(status, ServerError if status >= 500 else APIStatusError)
