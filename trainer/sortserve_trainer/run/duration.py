"""Durations as people write them: ``90``, ``90s``, ``20m``, ``1h30m``, ``2d``."""

from __future__ import annotations

import re

__all__ = ["duration_text", "parse_duration"]

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PARTS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", re.ASCII)
MAX_DIGITS = 9


def parse_duration(value: object) -> float:
    """Seconds, more than 0.

    Raises:
        ValueError: it is no duration.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        match = _PARTS.fullmatch(str(value).replace(" ", ""))
        parts = match.groups(default="0") if match else ("0",) * len(_SECONDS)
        if any(len(part) > MAX_DIGITS for part in parts):
            parts = ("0",) * len(_SECONDS)
        seconds = sum(int(part) * unit for part, unit in zip(parts, _SECONDS.values(), strict=True))
    if not 0 < seconds < float("inf"):
        raise ValueError("it should be a time above 0, such as 90s, 20m or 1h30m")
    return float(seconds)


def duration_text(seconds: float) -> str:
    """``1h30m`` for 5400; parts of a second are left out."""
    left, parts = int(seconds), []
    for name, unit in _SECONDS.items():
        count, left = divmod(left, unit)
        parts += [f"{count}{name}"] if count else []
    return "".join(parts) or "0s"
