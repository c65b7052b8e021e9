"""What the sync and the async client share: configuration, and reading answers. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, NoReturn, TypeVar

import httpx

from sortserve_client._address import bearer, parse_address
from sortserve_client._calls import Call
from sortserve_client._exceptions import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    InvalidResponseError,
    SortserveError,
    status_error_class,
)
from sortserve_client._retry import RetryPolicy, parse_retry_after

__all__ = ["DEFAULT_BASE_URL", "DEFAULT_TIMEOUT", "BaseClient", "raise_translated"]

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""A whole answer may take minutes; a server that is there accepts a connection at once."""
MAX_TIMEOUT_S = 1_000_000
MAX_TEXT_IN_MESSAGE = 200

_BEFORE_SENDING = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,  # it refused the tunnel to the server
)

T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)


class BaseClient:
    """Where the server is, who we are, and when to try again."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout: float | httpx.Timeout | None,
        retry_policy: RetryPolicy,
    ) -> None:
        self._address = parse_address(base_url)
        self._base_url = self._address.url
        # httpx's own kind of headers, whose repr hides the key: it shows in no traceback.
        self._headers = httpx.Headers({"User-Agent": f"sortserve-client/{_own_version()}"})
        if self._address.authorization is not None:
            if api_key is not None:
                raise ValueError("base_url holds a user name or password: give it or an api_key.")
            self._headers["Authorization"] = self._address.authorization
        elif api_key is not None:
            self._headers["Authorization"] = bearer(api_key)
        self._timeout = _checked_timeout(timeout)
        self._retry_policy = retry_policy

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self._base_url!r})"

    def _own_http(self, client: Callable[..., H], transport: Callable[[], object]) -> H:
        """An httpx client that asks a server on this machine itself, and never through a proxy.

        For any other host the proxies of the environment are httpx's business.

        Raises:
            ValueError: a proxy or certificate file that the environment names cannot be used.
        """
        try:
            return client(transport=transport()) if self._address.is_loopback else client()
        except (OSError, ImportError, ValueError, httpx.InvalidURL) as error:
            # httpx's words would show the proxy's password.
            raise ValueError(
                "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE or SSL_CERT_DIR in "
                f"the environment cannot be used ({type(error).__name__})."
            ) from None

    def _request_arguments(self, call: Call[Any]) -> dict[str, Any]:
        """Arguments of ``build_request``."""
        return {
            "method": call.method,
            "url": self._base_url + call.path,
            "json": call.body,
            "headers": self._headers,
            "timeout": self._timeout,
        }

    def _translate(self, error: httpx.HTTPError) -> SortserveError:
        """What an error of httpx's means to the caller: above all, whether the request was sent."""
        where = self._base_url
        if isinstance(error, httpx.HTTPStatusError):  # raised by a hook of the caller's own client
            return status_error(error.response)
        if isinstance(error, httpx.DecodingError | httpx.TooManyRedirects):
            return InvalidResponseError(f"{where} answered with what cannot be read: {error!r}")
        if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
            # Its text may quote a header, and so a key.
            return APIConnectionError(
                f"The request is not valid HTTP ({where}, {type(error).__name__}): look at the "
                "headers and transports of your http_client.",
                sent=_comes_from_http2(error),
                transient=False,
            )
        sent = not isinstance(error, _BEFORE_SENDING)
        if isinstance(error, httpx.TimeoutException):
            return APITimeoutError(f"No answer from {where} in time: {error!r}", sent=sent)
        if isinstance(error, httpx.ProxyError):
            what = "The proxy did not connect"
        else:
            what = "The connection broke" if sent else "Cannot connect; is the server running"
        return APIConnectionError(f"{what} ({where}): {error or error!r}", sent=sent)


def raise_translated(client: BaseClient, error: httpx.HTTPError) -> NoReturn:
    """Raise what ``error`` means, with ``error`` as its cause unless that could show a key."""
    hidden = isinstance(error, httpx.LocalProtocolError)
    raise client._translate(error) from (None if hidden else error)


def read_answer(call: Call[T], response: httpx.Response) -> T:
    """The typed answer.

    Raises:
        InvalidResponseError: it is not what the protocol says.
    """
    try:
        return call.parse(response)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidResponseError(
            f"{response.request.url} answered {response.status_code} with something that is not "
            f"a sortserve reply: {response.text[:MAX_TEXT_IN_MESSAGE]!r} ({error!r})"
        ) from error


def status_error(response: httpx.Response) -> APIStatusError:
    """The error for an answer with an error status; with its details if the body has been read."""
    body = _json_or_text(response)
    error = body.get("error") if isinstance(body, dict) else None
    details = error if isinstance(error, dict) else {}
    text = response.text[:MAX_TEXT_IN_MESSAGE].strip() if body else ""
    code = details.get("code")
    return status_error_class(response.status_code, code)(
        details.get("message") or text or response.reason_phrase,
        status=response.status_code,
        code=code,
        param=details.get("param"),
        type=details.get("type"),
        request_id=response.headers.get("x-request-id"),
        retry_after_s=parse_retry_after(response.headers.get("retry-after")),
        body=body,
    )


def _json_or_text(response: httpx.Response) -> Any:
    try:
        return response.json()
    except httpx.ResponseNotRead:
        return None
    except ValueError:
        return response.text


def _comes_from_http2(error: httpx.HTTPError) -> bool:
    """Whether this fault of ours was found in a connection that had already sent something.

    HTTP/1.1 checks a request before its first byte; in HTTP/2 any later frame can be the wrong one.
    """
    cause = error.__cause__.__context__ if error.__cause__ is not None else None
    return type(cause).__module__.partition(".")[0] == "h2"


def _checked_timeout(timeout: float | httpx.Timeout | None) -> float | httpx.Timeout | None:
    if isinstance(timeout, httpx.Timeout) or timeout is None:
        return timeout
    if not (isinstance(timeout, int | float) and 0 < timeout <= MAX_TIMEOUT_S):
        raise ValueError(
            f"timeout={timeout!r} is not allowed: it must be a number of seconds above 0 and at "
            f"most {MAX_TIMEOUT_S}, or None."
        )
    return timeout


def _own_version() -> str:
    try:
        return installed_version("sortserve")
    except PackageNotFoundError:  # run from a source tree
        return "0"
