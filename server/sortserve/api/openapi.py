"""What FastAPI cannot know of the OpenAPI document: what we read and refuse in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from sortserve import __version__
from sortserve.api.http.security import OPEN_PATHS
from sortserve.api.settings import ApiSettings

__all__ = ["install_openapi"]

_SCHEMA_REF = "#/components/schemas/{model}"


def install_openapi(
    app: FastAPI, routers: Sequence[APIRouter], settings: ApiSettings, *, needs_key: bool
) -> None:
    """Make ``app.openapi()`` complete: bodies, and the security scheme if there are keys."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title="sortserve",
                version=__version__,
                description="An inference server for language models in which depth is a budget.",
                routes=app.routes,
                servers=[{"url": settings.root_path}] if settings.root_path else None,
            )
            _add_bodies(document, routers)
            _drop_unused_422(document)
            if needs_key:
                _require_key(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_bodies(document: dict[str, Any], routers: Sequence[APIRouter]) -> None:
    """The types of the routes' parameters ``body``: to FastAPI they are mere dependencies."""
    routes = [route for router in routers for route in router.routes]
    bodies = {
        route.path: get_type_hints(route.endpoint)["body"]
        for route in routes
        if isinstance(route, APIRoute) and "body" in get_type_hints(route.endpoint)
    }
    for path, model in bodies.items():
        content = {
            "application/json": {"schema": {"$ref": _SCHEMA_REF.format(model=model.__name__)}}
        }
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    _, schemas = models_json_schema(
        [(model, "validation") for model in bodies.values()], ref_template=_SCHEMA_REF
    )
    for schema in schemas["$defs"].values():
        for field in schema.get("properties", {}).values():
            # Null means absent. As a default it would have to be of the field's type, and is not.
            if field.get("default", ...) is None:
                del field["default"]
    document["components"]["schemas"] |= schemas["$defs"]


def _drop_unused_422(document: dict[str, Any]) -> None:
    """FastAPI announces a 422 for every parameter; here nothing is ever answered so."""
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
