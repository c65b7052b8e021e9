"""Reading a request's body into its schema."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from sortserve.api.problems import invalid_body, shortened, unknown_field
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
        content = from_json(await request.body())
    except ValueError as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error}.", code="invalid_json"
        ) from None
    if not isinstance(content, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    if schema.model_config.get("extra") == "forbid":
        # Pydantic would describe each of them, and a body may hold half a million.
        for name in content:
            if name not in schema.model_fields:
                raise unknown_field(name, schema.model_fields)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise invalid_body(error) from None
