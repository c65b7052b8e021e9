"""The weights of one exit's losses (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExitTerm"]


@dataclass(frozen=True)
class ExitTerm:
    """``ce * CE(targets, exit) + kl * KL(teacher || exit)``."""

    ce: float = 0.0
    kl: float = 0.0
