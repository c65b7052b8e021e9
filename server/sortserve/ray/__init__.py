"""Ray Serve: the HTTP service as an ingress, engines as replicas (needs the extra ``ray``).

``sortserve.ray:app`` is for ``serve run`` and for a RayService; it is configured as ``sortserve
serve`` is, by ``SORTSERVE_*`` variables and the file that ``SORTSERVE_CONFIG`` names.
``sortserve.ray:build_app`` takes settings as arguments, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sortserve.ray.application import build_app as build_app

__all__ = ["build_app"]


def __getattr__(name: str) -> Any:
    """``app`` and ``build_app``, made when they are asked for: they read settings and load Ray."""
    if name not in ("app", "build_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sortserve.ray import application

    return application.build_app({}) if name == "app" else application.build_app
