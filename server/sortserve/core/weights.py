"""What a request is worth beside others: service tiers, priorities, and what a key may ask for.

    weight = weight of the tier * base ** -priority

It lies from 0.001 to 1000, and is at most what the key may have.
A tier is OpenAI's name for a class of service; a lower priority is earlier, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sortserve.core.ranges import Range, integers

__all__ = [
    "PRIORITY",
    "TIER_WEIGHTS",
    "WEIGHT",
    "KeyWeights",
    "WeightRules",
    "Worth",
    "read_weight",
]

PRIORITY = integers(-100, 100)
WEIGHT = Range(least=1e-3, most=1e3, allowed="a number from 0.001 to 1000")
TIER_WEIGHTS = {"flex": 0.25, "default": 1.0, "priority": 4.0}
"""The tiers there are, and their weights unless configured."""
DEFAULT_TIER = "default"
UNNAMED = (None, "auto")
"""What leaves the tier to the server: the key's default weight counts."""


def read_weight(text: str) -> float | None:
    """The weight that a text says; None: it says none, or one that is not in ``WEIGHT``."""
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if weight in WEIGHT else None


@dataclass(frozen=True)
class KeyWeights:
    """What an API key's requests are worth."""

    default: float | None = None
    """Of requests that name no tier; None: that of the tier ``default``."""
    most: float | None = None
    """What is asked for beyond it is cut; None: nothing is."""


class Worth(NamedTuple):
    """What a request counts as."""

    weight: float
    tier: str
    """The tier that was used, for the reply."""


@dataclass(frozen=True)
class WeightRules:
    """From what a request asks for to its weight."""

    tiers: Mapping[str, float] = field(default_factory=lambda: dict(TIER_WEIGHTS))
    """Weight of each tier of ``TIER_WEIGHTS``."""
    priority_base: float = 1.1
    """A priority of one less is worth so many times as much; at least 1."""

    def __post_init__(self) -> None:
        assert self.tiers.keys() == TIER_WEIGHTS.keys()
        assert all(weight in WEIGHT for weight in self.tiers.values())
        assert self.priority_base >= 1.0

    def weigh(self, tier: str | None, priority: int, key: KeyWeights = KeyWeights()) -> Worth:
        """The weight of a request, and the tier that it was served as.

        Args:
            tier: the ``service_tier`` it names; one that is not among ours counts as ``default``.
            priority: in ``PRIORITY``; lower is earlier.
            key: what its API key may have.
        """
        assert priority in PRIORITY
        own = self.tiers.get(tier or DEFAULT_TIER, self.tiers[DEFAULT_TIER])
        if tier in UNNAMED and key.default is not None:
            own = key.default
        most = WEIGHT.most if key.most is None else key.most
        assert most is not None
        weight = max(WEIGHT.least, min(own * self.priority_base**-priority, WEIGHT.most or most))
        return Worth(min(weight, most), self._served_as(tier, min(own, most)))

    def _served_as(self, tier: str | None, weight: float) -> str:
        """The tier of a weight: the one named if it has it, else the best that is worth no more."""
        named = tier if tier is not None and tier in self.tiers else DEFAULT_TIER
        if self.tiers[named] == weight:
            return named
        within = [name for name, own in self.tiers.items() if own <= weight]
        return max(within, key=self.tiers.__getitem__) if within else self._least()

    def _least(self) -> str:
        return min(self.tiers, key=self.tiers.__getitem__)
