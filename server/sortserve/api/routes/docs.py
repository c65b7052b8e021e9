"""``GET /docs``: Swagger UI over ``/openapi.json``, with a field for the key.

Swagger's files come from an installed package, so that it works without any network but the
server's. The page needs no key; ``/openapi.json`` and what the page sends do.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request, Response

from sortserve.api.routes.pages import page_file

__all__ = ["PATHS", "router"]

_FOLDER = Path(__file__).parents[1] / "docs_page"
_SWAGGER = {"swagger-ui.js": "swagger-ui-bundle.js", "swagger-ui.css": "swagger-ui.css"}
_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
    "script-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_NAMES = frozenset(path.name for path in _FOLDER.iterdir() if path.name != "index.html")

PATHS = frozenset({"/docs", *(f"/docs/{name}" for name in {*_NAMES, *_SWAGGER})})
"""The page and its files: what a browser asks for before anybody could give it a key."""

router = APIRouter(include_in_schema=False)
"""The page and its files."""


@router.get("/docs")
async def page(request: Request) -> Response:
    """The page. Its addresses are relative: a proxy's prefix may stand before them."""
    return await page_file(request, _FOLDER, "index.html", _POLICY)


@router.get("/docs/{name}")
async def file(request: Request, name: str) -> Response:
    """One of its files, or of Swagger UI's."""
    if name in _SWAGGER:
        folder = Path(str(files("fastapi_offline"))) / "static"
        return await page_file(request, folder, _SWAGGER[name], _POLICY)
    return await page_file(request, _FOLDER, name, _POLICY)
