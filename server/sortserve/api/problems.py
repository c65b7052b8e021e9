"""Every error as the OpenAI error body: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sortserve.core.errors import (
    InvalidRequestError,
    NotFoundError,
    SortserveError,
    UnavailableError,
    in_our_words,
    shortened,
)

__all__ = [
    "error_body",
    "error_response",
    "http_exception_response",
    "renamed",
    "shortened",
    "sortserve_error_response",
    "unavailable_response",
    "unknown_field",
    "validation_response",
]

MAX_MESSAGE_CHARS = 1000
MAX_PARAM_CHARS = 200
RETRY_AFTER_S = 5
"""When to ask again a server that is loading, draining or failed."""


def error_body(error: SortserveError) -> dict[str, Any]:
    """The body of an error, with what it quotes of the client's own words cut."""
    body = error.body()
    if len(error.message) > MAX_MESSAGE_CHARS:
        body["error"]["message"] = error.message[:MAX_MESSAGE_CHARS] + " ..."
    if error.param is not None:
        body["error"]["param"] = error.param[:MAX_PARAM_CHARS]
    return body


def error_response(error: SortserveError, headers: Mapping[str, str] | None = None) -> Response:
    """The reply to an error, with headers that say whether and when to come back."""
    all_headers = dict(headers or {})
    if error.retry_after_s is not None:
        all_headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.status in (429, 503):
        all_headers["Retry-After"] = "1"
    if error.is_final:
        all_headers["X-Should-Retry"] = "false"
    if error.status == 401:
        all_headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=all_headers)


def unavailable_response(state: str, message: str) -> Response:
    """A 503 with the ``status`` that probes read beside the error."""
    error = UnavailableError(message, code=state)
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    body = {"status": state, **error.body()}
    return JSONResponse(body, status_code=error.status, headers=headers)


async def sortserve_error_response(request: Request, error: Exception) -> Response:
    """Handler of ``SortserveError``."""
    assert isinstance(error, SortserveError)
    return error_response(error)


async def http_exception_response(request: Request, error: Exception) -> Response:
    """Handler of the framework's own errors: no such route, no such method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, shortened(request.url.path)
    problem: SortserveError
    if error.status_code == 404:
        problem = NotFoundError(f"There is no route {method} {path}.")
    else:
        problem = InvalidRequestError(f"{method} {path}: {error.detail}.", code="http_error")
    headers = dict(error.headers or {})
    if "Allow" in headers:
        methods = {method.strip() for method in headers["Allow"].split(",")}
        headers["Allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    response = error_response(problem, headers)
    response.status_code = error.status_code
    return response


async def validation_response(request: Request, error: Exception) -> Response:
    """Handler of what pydantic refuses, in bodies and parameters."""
    assert isinstance(error, RequestValidationError)
    return error_response(_invalid(error.errors()[0]))


def _invalid(first: Mapping[str, Any]) -> InvalidRequestError:
    """One sentence on the first thing that is wrong: field, value, what is allowed."""
    param = ".".join(str(part) for part in first["loc"][1:])  # without body, header or path
    if first["type"] == "missing":
        return InvalidRequestError(f"{param} is missing; it is required.", param=param)
    allowed = in_our_words(first["msg"])
    allowed = allowed[0].lower() + allowed[1:]
    return InvalidRequestError(
        f"{param}={shortened(first['input'])} is not allowed: {allowed}.", param=param
    )


def unknown_field(param: str, known: Mapping[str, Any]) -> InvalidRequestError:
    """The field is not one of ``known``; the nearest of them is hinted at."""
    param = param[:MAX_PARAM_CHARS]
    close = difflib.get_close_matches(param, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(known)}."
    return InvalidRequestError(f"{param} is not a field here: {hint}", param=param)


def renamed(error: SortserveError, names: Mapping[str, str]) -> SortserveError:
    """The error in the words of the request: the engine's field names as the client typed them."""
    name = names.get(error.param or "")
    return error if name is None else error.about(name)
