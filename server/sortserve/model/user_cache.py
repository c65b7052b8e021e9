"""Where things that are costly to make are kept between starts (no torch)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache_dir"]


def user_cache_dir() -> Path:
    """``SORTSERVE_CACHE_DIR``, else ``sortserve`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if named := os.environ.get("SORTSERVE_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sortserve"
