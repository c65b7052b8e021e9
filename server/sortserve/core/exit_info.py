"""One exit of a checkpoint (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ExitInfo"]


@dataclass(frozen=True, kw_only=True)
class ExitInfo:
    """What the server knows of one sub-model before it has served a request."""

    exit_layer: int
    num_parameters: int
    """Parameters of trunk prefix, exit module, norm, embedding and head; a tied head once."""
    compute: float
    """FLOPs per token relative to the full model, head and exit module included; in (0, 1]."""
    score: float | None = None
    """Quality relative to the full model from ``sorted.json``; None where it was not measured."""
    quality: Mapping[str, float] | None = None
    usable: bool | None = None
    """Whether the evaluation found its answers fit to be read; None: nobody judged."""
