"""The OpenAPI document: bodies are read by hand, so their schemas are added by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sortserve import __version__
from sortserve.api.bodies.models import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
)
from sortserve.api.bodies.parameters import BUDGET_HEADERS
from sortserve.api.http.security import OPEN_PATHS
from sortserve.api.replies.models import ErrorResponse
from sortserve.api.settings import ApiSettings
from sortserve.core.budget import MAX_MS

__all__ = ["documented", "install_openapi"]

_SCHEMA_REF = "#/components/schemas/{model}"
_BODIES = (
    GenerateBody,
    CompletionBody,
    ChatCompletionBody,
    TokenizeBody,
    DetokenizeBody,
)
_ERRORS = {
    400: "A field is missing, unknown or has a value that is not allowed",
    401: "The API key is missing or wrong",
    404: "No such model",
    413: "The body is too large",
    429: "The queue is full, or the budget cannot be met; see Retry-After",
    500: "The server failed on this request",
    503: "Loading, draining or failed; see Retry-After",
    504: "The request ran longer than this server allows",
}
_BODY_ERRORS = (400, 401, 404, 413, 500)
_GENERATION_ERRORS = (*_BODY_ERRORS, 429, 503, 504)

_BUDGET_HEADER_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": header,
        "in": "header",
        "required": False,
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_MS},
        "description": f"The same as budget.{name} of the body, which wins.",
    }
    for header, name in BUDGET_HEADERS.items()
]


def documented(
    reply: type[BaseModel],
    body: type[BaseModel] | None = None,
    *,
    generates: bool = False,
    errors: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Arguments of a route decorator that describe its body and its replies.

    Args:
        reply: what a 200 carries.
        body: what the client sends.
        generates: whether budgets may come as headers, and replies as a stream.
        errors: the other statuses, where they are not those of every route of its kind.
    """
    if errors is None:
        errors = _GENERATION_ERRORS if generates else (401,) if body is None else _BODY_ERRORS
    responses: dict[int | str, dict[str, Any]] = {200: {"model": reply}}
    for status in sorted(errors):
        responses[status] = {"model": ErrorResponse, "description": _ERRORS[status]}
    extra: dict[str, Any] = {}
    if generates:
        responses[200]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
        extra["parameters"] = _BUDGET_HEADER_PARAMETERS
    if body is not None:
        ref = _SCHEMA_REF.format(model=body.__name__)
        content = {"application/json": {"schema": {"$ref": ref}}}
        extra["requestBody"] = {"required": True, "content": content}
    return {"response_model": None, "responses": responses, "openapi_extra": extra}


def install_openapi(app: FastAPI, settings: ApiSettings) -> None:
    """Make ``app.openapi()`` complete: body schemas, and the security scheme if there are keys."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title="sortserve",
                version=__version__,
                description="An inference server for language models in which depth is a budget.",
                routes=app.routes,
                servers=[{"url": settings.root_path}] if settings.root_path else None,
            )
            _, schemas = models_json_schema(
                [(model, "validation") for model in _BODIES], ref_template=_SCHEMA_REF
            )
            document["components"]["schemas"] |= schemas["$defs"]
            _drop_unused_422(document)
            if settings.api_keys:
                _require_key(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _drop_unused_422(document: dict[str, Any]) -> None:
    """FastAPI announces a 422 for path parameters; here nothing is ever answered so."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _require_key(document: dict[str, Any]) -> None:
    scheme = {"type": "http", "scheme": "bearer"}
    document["components"]["securitySchemes"] = {"key": scheme}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
