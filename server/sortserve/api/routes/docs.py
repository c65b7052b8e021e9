"""``GET /docs``: Swagger's own page over ``/openapi.json``.

Its files come from an installed package, so that it works without any network but the server's.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse

__all__ = ["router"]

_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def page() -> Response:
    """The page. Its addresses are relative: a proxy's prefix may stand before them."""
    page = get_swagger_ui_html(
        title="sortserve API",
        openapi_url="openapi.json",
        swagger_js_url="docs/swagger-ui.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},  # else Swagger asks a server of its own
    )
    page.headers["Content-Security-Policy"] = _POLICY
    return page


@router.get("/docs/swagger-ui.js")
async def script() -> Response:
    """Swagger UI."""
    return _file("swagger-ui-bundle.js")


@router.get("/docs/swagger-ui.css")
async def style() -> Response:
    """Its style."""
    return _file("swagger-ui.css")


def _file(name: str) -> Response:
    return FileResponse(Path(str(files("fastapi_offline"))) / "static" / name)
