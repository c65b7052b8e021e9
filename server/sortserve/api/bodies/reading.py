"""Reading a request's body into its model."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from sortserve.api.bodies.encodings import (
    decompressed,
    is_compressed,
    without_mark,
    without_points,
)
from sortserve.api.bodies.json_scan import check_size
from sortserve.api.bodies.limits import BodyLimits
from sortserve.api.problems import shortened
from sortserve.api.text_threads import TextThreads
from sortserve.core.errors import InvalidRequestError

__all__ = ["read_body"]

T = TypeVar("T", bound=BaseModel)

THREAD_FROM_BYTES = 8192
"""Bodies from this length on are read on a thread: they would hold up every stream."""


async def read_body(
    request: Request,
    model: type[T],
    *,
    limits: BodyLimits,
    threads: TextThreads,
    max_body_bytes: int,
) -> T:
    """The validated body; a large one is read on a thread, and ``request.state.is_large`` says so.

    Only bodies that say they are JSON are read: a web page may make a browser send any other kind
    to this server without asking the user. It may be compressed with gzip.

    Raises:
        InvalidRequestError: no JSON, or too large.
        PayloadTooLargeError: more than ``max_body_bytes`` once it is decompressed.
        RequestValidationError: not what the model says.
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
    is_packed = is_compressed(request.headers.get("content-encoding", ""))
    # Not request.body(): it would keep the bytes until the last token is out.
    content = b"".join([chunk async for chunk in request.stream() if chunk])
    if is_packed:
        content = await threads.run(partial(decompressed, content, max_body_bytes))
    request.state.is_large = len(content) >= THREAD_FROM_BYTES
    if not request.state.is_large:
        return await threads.in_turn(lambda: _validated(content, model, limits))
    return await threads.run(lambda: _validated(content, model, limits))


def _validated(content: bytes, model: type[T], limits: BodyLimits) -> T:
    content = without_mark(content)
    is_strict = model.model_config.get("extra") == "forbid"
    check_size(content, limits, known_fields=model.model_fields if is_strict else None)
    try:
        fields = from_json(content)
    except ValueError as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error}.", code="invalid_json"
        ) from None
    assert isinstance(fields, dict), "the size check lets nothing else through"
    try:
        return model.model_validate(without_points(fields))
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False)
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from None
