"""sortserve: an inference server for language models in which depth is a budget.

from sortserve import LLM, Budget, SamplingParams

``LLM`` is the engine in this process; importing it loads torch, importing this package does not.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sortserve.core.budget import Budget
    from sortserve.core.sampling_params import SamplingParams
    from sortserve.core.schedule import DepthSchedule
    from sortserve.llm import LLM

__version__ = "0.1.0"

# PyTorch's helpers spin for milliseconds after each parallel operation (sampling has some), on
# cores that our kernels want. They read this when torch is imported. About 50 us are left, so that
# one operation can follow another without a sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__all__ = ["LLM", "Budget", "DepthSchedule", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "sortserve.llm",
    "Budget": "sortserve.core.budget",
    "DepthSchedule": "sortserve.core.schedule",
    "SamplingParams": "sortserve.core.sampling_params",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing.startswith("sortserve"):
            raise
        raise ModuleNotFoundError(
            f"sortserve.{name} needs {missing}, which is not installed: "
            "pip install 'sortserve[server]'",
            name=error.name,
        ) from error
