"""Reading a request's body into its schema."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from sortserve.api.problems import invalid_body, shortened
from sortserve.errors import InvalidRequestError

__all__ = ["read_body"]

T = TypeVar("T", bound=BaseModel)


async def read_body(request: Request, schema: type[T]) -> T:
    """The body, validated.

    Only bodies that say they are JSON are read: a web page may make a browser send any other kind
    to this server without asking the user.

    Raises:
        InvalidRequestError: no JSON, or not what the schema says; ``param`` is the dotted path.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidRequestError(
            f"Content-Type={shortened(content_type)} is not allowed: send the body as JSON with "
            "the header `Content-Type: application/json`.",
            param="content-type",
            code="unsupported_media_type",
        )
    try:
        return schema.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid_body(error, schema) from None
