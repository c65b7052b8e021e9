"""``GET /``: a page on which people can try the model and its budgets.

Plain files, nothing that was built, and nothing that comes from elsewhere. The page needs no key;
what it asks of the API does, and it asks its reader for one.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response

from sortserve.api.routes.pages import page_file

__all__ = ["PATHS", "page_at", "router"]

_FOLDER = Path(__file__).parents[1] / "playground"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_NAMES = frozenset(path.name for path in _FOLDER.iterdir() if path.name != "index.html")

PATHS = frozenset({"/", *(f"/playground/{name}" for name in _NAMES)})
"""The page and its files: what a browser asks for before anybody could give it a key."""

router = APIRouter(include_in_schema=False)
"""The page and its files."""


async def page_at(request: Request, path: str) -> Response:
    """What lies at one of ``PATHS``, also for a server whose model is still loading."""
    name = path.removeprefix("/playground/") if path != "/" else "index.html"
    return await page_file(request, _FOLDER, name, _POLICY)


@router.get("/")
async def page(request: Request) -> Response:
    """The page. Its addresses are relative: a proxy's prefix may stand before them."""
    return await page_at(request, "/")


@router.get("/playground/{name}")
async def file(request: Request, name: str) -> Response:
    """One of its files."""
    return await page_file(request, _FOLDER, name, _POLICY)
