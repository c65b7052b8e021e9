"""Reading a request's body into its schema, and into what the route makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from sortserve.api.bodies.json_scan import check_size
from sortserve.api.bodies.limits import BodyLimits
from sortserve.api.problems import invalid_body, shortened
from sortserve.api.text_threads import TextThreads
from sortserve.core.errors import InvalidRequestError

__all__ = ["read_body"]

T = TypeVar("T", bound=BaseModel)
R = TypeVar("R")

THREAD_FROM_BYTES = 8192
"""Bodies from this length on are read on a thread: they would hold up every stream."""


async def read_body(
    request: Request,
    schema: type[T],
    then: Callable[[T], R],
    *,
    limits: BodyLimits,
    threads: TextThreads,
) -> R:
    """What ``then`` makes of the validated body; a large one is read on a thread, ``then`` too.

    Only bodies that say they are JSON are read: a web page may make a browser send any other kind
    to this server without asking the user.

    Raises:
        InvalidRequestError: no JSON, too large, or not what the schema says; ``param`` is the
            dotted path.
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
    # Not request.body(): it would keep the bytes until the last token is out.
    content = b"".join([chunk async for chunk in request.stream() if chunk])
    if len(content) < THREAD_FROM_BYTES:
        return then(_validated(content, schema, limits))
    return await threads.run(lambda: then(_validated(content, schema, limits)))


def _validated(content: bytes, schema: type[T], limits: BodyLimits) -> T:
    is_strict = schema.model_config.get("extra") == "forbid"
    check_size(content, limits, known_fields=schema.model_fields if is_strict else None)
    try:
        fields = from_json(content)
    except ValueError as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error}.", code="invalid_json"
        ) from None
    assert isinstance(fields, dict), "the size check lets nothing else through"
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise invalid_body(error) from None
