"""Files for a browser: what each page may do, and when a browser may keep them."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

__all__ = ["page_file"]

_HEADERS = {
    "Cache-Control": "no-cache",  # keep it, and ask each time whether it has changed
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


async def page_file(request: Request, folder: Path, name: str, policy: str) -> Response:
    """A file of a folder, or a 304 if the browser has it already.

    Args:
        request: a GET.
        folder: where the file is.
        name: its name there.
        policy: the Content-Security-Policy: what a page may load and do.

    Raises:
        HTTPException: 404, there is no such file.
    """
    response = await StaticFiles(directory=folder).get_response(name, request.scope)
    response.headers.update({**_HEADERS, "Content-Security-Policy": policy})
    return response
