"""A machine on which only what ``sortserve.LLM`` needs is installed, as far as imports can tell.

environment = bare_environment(tmp_path)   # for subprocesses, and all that they start
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["MISSING", "bare_environment", "hide"]

ROOT = Path(__file__).resolve().parents[2]
MISSING = frozenset(
    {
        *("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "pydantic_settings"),
        "prometheus_client",
        *("gguf", "bitsandbytes", "datasets", "matplotlib", "openai", "pytest_asyncio"),
        *("schemathesis", "uvloop", "websockets", "llguidance", "rich"),
    }
)
"""What a machine for GPU checks need not have."""


class _Finder(PathFinder):
    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in MISSING:
            return None
        return super().find_spec(fullname, path, target)


def hide() -> None:
    """Make the missing packages impossible to import in this process."""
    import sys

    finder: Any = _Finder
    sys.meta_path[:] = [finder if each is PathFinder else each for each in sys.meta_path]


def bare_environment(folder: Path) -> dict[str, str]:
    """The environment of a process that has nothing of what is missing; ``folder`` is for a file
    that Python runs at its start.
    """
    (folder / "sitecustomize.py").write_text("from support.bare_machine import hide\nhide()\n")
    paths = [folder, *(ROOT / name for name in ("server", "client", "trainer", "tests"))]
    # Plugins are found by their distributions, which are still there.
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
