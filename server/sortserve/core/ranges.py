"""Which numbers a field may hold: one place for the check and for the API's document (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Range", "integers", "numbers"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from a least to a most one; ``value in range_`` is false for all that is no number.

    It compares and converts nothing: an integer may be too large for a float. NaN is in no range.
    """

    least: float
    most: float | None = None
    is_integer: bool = False
    without_least: bool = False
    """``least`` itself is outside."""
    allowed: str
    """What is inside, for an error message."""

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(
            value, int if self.is_integer else int | float
        ):
            return False
        is_above = value > self.least if self.without_least else value >= self.least
        return is_above and (self.most is None or value <= self.most)

    @property
    def json_schema(self) -> dict[str, Any]:
        """The same for the OpenAPI document."""
        schema: dict[str, Any] = {"type": "integer" if self.is_integer else "number"}
        schema["exclusiveMinimum" if self.without_least else "minimum"] = self.least
        return schema if self.most is None else {**schema, "maximum": self.most}


def integers(least: int, most: int) -> Range:
    """The integers from ``least`` to ``most``."""
    allowed = f"an integer from {least} to {most}"
    return Range(least=least, most=most, is_integer=True, allowed=allowed)


def numbers(least: int, most: int) -> Range:
    """The numbers from ``least`` to ``most``."""
    return Range(least=least, most=most, allowed=f"a number from {least} to {most}")
