"""``GET /docs``: one page of our own, so that it works without any network but the server's."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response

__all__ = ["router"]

_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ),
}


router = APIRouter()
_page = cache(files("sortserve.api").joinpath("static/docs.html").read_bytes)


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The page that shows ``/openapi.json``."""
    return Response(_page(), headers=_HEADERS)
