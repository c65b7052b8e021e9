"""The directories of this process, found by routers that Ray Serve makes (no Ray).

Ray makes the router of a deployment's handle itself, from a class that it has pickled by value. So
what a router shares with the rest of its process lies in a module of its own, which is imported.
"""

from __future__ import annotations

import threading
import time

from sortserve.replicas.directory import Directory

__all__ = ["directory_of"]

_LOCK = threading.Lock()
_DIRECTORIES: dict[tuple[str, str], Directory] = {}


def directory_of(app_name: str, deployment: str) -> Directory:
    """The directory of a deployment's replicas in this process; made by whoever asks first."""
    with _LOCK:
        return _DIRECTORIES.setdefault((app_name, deployment), Directory(time.monotonic))
