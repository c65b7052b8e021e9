"""The load that others are multiples of: the rate at which full depth meets half of the budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["HalfRateSearch"]

HALF = 0.5


@dataclass
class HalfRateSearch:
    """Bisects the logarithm of a rate. Ask for ``rate``, run it, ``tell`` the share that was met.

        search = HalfRateSearch(2.0)
        while not search.is_done:
            search.tell(share_met_at(search.rate))
        print(search.rate)

    Args:
        rate: requests a second to begin with.
        tolerance: a share as near to one half as this ends the search.
        precision: so does a bracket whose ends differ by no more than this factor.
        max_tries: so do as many tries.
    """

    rate: float
    tolerance: float = 0.03
    precision: float = 1.03
    max_tries: int = 12
    is_done: bool = False
    _low: float | None = None
    _high: float | None = None
    tried: list[tuple[float, float]] = field(default_factory=list)
    """Rates and shares, in their order."""

    def tell(self, share: float) -> None:
        """The share of budgets met at ``rate``; sets the next rate, or the answer."""
        assert not self.is_done
        self.tried.append((self.rate, share))
        if abs(share - HALF) <= self.tolerance:
            self.is_done = True
            return
        if share > HALF:
            self._low = self.rate
        else:
            self._high = self.rate
        if self._low is None or self._high is None:
            self.rate *= 2.0 if self._high is None else 0.5
        else:
            self.is_done = self._high / self._low <= self.precision
            self.rate = math.sqrt(self._low * self._high)
        self.is_done = self.is_done or len(self.tried) >= self.max_tries
