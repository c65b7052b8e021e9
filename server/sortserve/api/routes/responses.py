"""What routes may answer, for their decorators."""

from __future__ import annotations

from typing import Any

from sortserve.api.generation import REPLY_HEADERS
from sortserve.api.replies.models import ErrorResponse

__all__ = ["BODY_ERRORS", "GENERATION_RESPONSES", "errors"]

Responses = dict[int | str, dict[str, Any]]

_ERRORS = {
    400: "A field is missing, unknown or has a value that is not allowed",
    401: "The API key is missing or wrong",
    403: "The API key may not have the exit that the request names",
    404: "No such model",
    413: "The body is too large",
    429: "The queue is full, the budget cannot be met, or the API key is over a limit of its own; "
    "see Retry-After",
    500: "The server failed on this request",
    503: "Loading, draining or failed; see Retry-After",
    504: "The request ran longer than this server allows",
}


def errors(*statuses: int) -> Responses:
    """The error body under each of these statuses."""
    return {status: {"model": ErrorResponse, "description": _ERRORS[status]} for status in statuses}


BODY_ERRORS = errors(400, 401, 404, 413, 429, 500)
"""Of routes that read a body."""
GENERATION_RESPONSES: Responses = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "headers": {
            name: {"description": words, "schema": {"type": "string"}}
            for name, words in REPLY_HEADERS.items()
        },
    },
    **errors(400, 401, 403, 404, 413, 429, 500, 503, 504),
}
"""Of routes that generate: a stream beside the model, and every error."""
