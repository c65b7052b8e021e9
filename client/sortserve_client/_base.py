"""What the sync and the async client share: configuration, and reading answers. No I/O."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, TypeVar

import httpx

from sortserve_client._calls import Call
from sortserve_client._exceptions import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    InvalidResponseError,
    status_error_class,
)
from sortserve_client._retry import RetryPolicy, parse_retry_after

__all__ = ["DEFAULT_BASE_URL", "DEFAULT_TIMEOUT", "BaseClient"]

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""A whole answer may take minutes; a server that is there accepts a connection at once."""
MAX_TEXT_IN_MESSAGE = 200

T = TypeVar("T")


class BaseClient:
    """Where the server is, who we are, and when to try again."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout: float | httpx.Timeout | None,
        retry_policy: RetryPolicy,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url!r} must start with http:// or https://.")
        self._base_url = base_url.rstrip("/")
        self._headers = {"User-Agent": f"sortserve-client/{_own_version()}"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._retry_policy = retry_policy

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self._base_url!r})"

    def _request_arguments(self, call: Call[Any]) -> dict[str, Any]:
        """Arguments of ``build_request``."""
        return {
            "method": call.method,
            "url": self._base_url + call.path,
            "json": call.body,
            "headers": self._headers,
            "timeout": self._timeout,
        }

    def _connection_error(self, error: httpx.HTTPError) -> APIConnectionError:
        sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        if isinstance(error, httpx.TimeoutException):
            return APITimeoutError(f"No answer from {self._base_url} in time: {error!r}", sent=sent)
        what = "The connection broke" if sent else "Cannot connect; is the server running"
        return APIConnectionError(f"{what} ({self._base_url}): {error or error!r}", sent=sent)


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
    """The error for an answer with an error status, whose body has been read."""
    body = _json_or_text(response)
    error = body.get("error") if isinstance(body, dict) else None
    details = error if isinstance(error, dict) else {}
    text = response.text[:MAX_TEXT_IN_MESSAGE].strip()
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
    except ValueError:
        return response.text


def _own_version() -> str:
    try:
        return installed_version("sortserve")
    except PackageNotFoundError:  # run from a source tree
        return "0"
