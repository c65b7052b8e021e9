"""How long answers get, learned from those that ended (no torch).

Lengths are counted in buckets of growing width. Each bucket has a hazard: of the answers that
reached it, the share that ended in it of their own accord. Answers cut by ``max_tokens`` or by a
deadline count as having got so far and say nothing of where they would have ended (Kaplan and
Meier, 1958). The same table answers for a request that has run for a while, from its bucket on.
"""

from __future__ import annotations

import bisect
import itertools

from sortserve.outputs import GenerationRequest

__all__ = ["LengthEstimator", "expected_tokens"]

MIN_ENDED = 20
FORGET = 0.998
"""The weight of an answer after each later one: about five hundred count."""
GROWTH = 1.25
MAX_TOKENS = 1 << 20


def _bounds() -> tuple[int, ...]:
    """1, 2, 3, ... and then a quarter wider each: the first length of each bucket."""
    bounds = [1]
    while bounds[-1] < MAX_TOKENS:
        bounds.append(max(bounds[-1] + 1, int(bounds[-1] * GROWTH)))
    return tuple(bounds)


def expected_tokens(request: GenerationRequest, num_so_far: int, lengths: LengthEstimator) -> int:
    """The output tokens to plan a request for, given how many it has."""
    limit = request.sampling.max_tokens
    if request.sampling.ignore_eos and not request.sampling.stop:
        return limit
    learned = lengths.expect(num_so_far, limit)
    if learned is not None:
        return learned
    guess = limit if request.expected_tokens is None else request.expected_tokens
    if num_so_far >= guess:  # longer than thought: a quarter more, and again
        guess = num_so_far + max(1, num_so_far // 4)
    return min(guess, limit)


class LengthEstimator:
    """Quantiles of the number of output tokens, given how many have come.

    Args:
        quantile: of the answers that are still running, the share that the estimate shall cover.
    """

    BOUNDS = _bounds()

    def __init__(self, quantile: float = 0.9) -> None:
        assert 0.0 < quantile < 1.0
        self._quantile = quantile
        self._ended = [0.0] * len(self.BOUNDS)
        self._cut = [0.0] * len(self.BOUNDS)
        self._weight = 0.0
        self._totals: list[int] | None = None

    def observe(self, num_tokens: int, *, cut: bool) -> None:
        """Learn from an answer of so many tokens.

        Args:
            num_tokens: its length.
            cut: it did not end of its own accord.
        """
        if num_tokens < 1:
            return
        bucket = bisect.bisect_right(self.BOUNDS, num_tokens) - 1
        self._ended = [FORGET * weight for weight in self._ended]
        self._cut = [FORGET * weight for weight in self._cut]
        (self._cut if cut else self._ended)[bucket] += 1.0
        self._weight = FORGET * self._weight + (not cut)
        self._totals = None

    def expect(self, num_so_far: int, max_tokens: int) -> int | None:
        """The total length to plan for: above what has come, at most ``max_tokens``.

        None before enough answers have ended.
        """
        if self._weight < MIN_ENDED:
            return None
        if self._totals is None:
            self._totals = self._quantiles()
        bucket = bisect.bisect_right(self.BOUNDS, num_so_far + 1) - 1
        return min(max(self._totals[bucket], num_so_far + 1), max_tokens)

    def _quantiles(self) -> list[int]:
        """For each bucket: the length that the wanted share of answers reaching it stays within."""
        at_risk = list(
            itertools.accumulate(
                (e + c for e, c in zip(reversed(self._ended), reversed(self._cut), strict=True))
            )
        )[::-1]
        survival = [1.0]  # at the start of each bucket
        for ended, risk in zip(self._ended, at_risk, strict=True):
            survival.append(survival[-1] * (1.0 - ended / risk if risk > 0 else 1.0))
        return [self._quantile_from(start, survival) for start in range(len(self.BOUNDS))]

    def _quantile_from(self, start: int, survival: list[float]) -> int:
        if survival[start] <= 0.0:
            return self.BOUNDS[start]
        left = survival[start] * (1.0 - self._quantile)
        for bucket in range(start, len(self.BOUNDS)):
            if survival[bucket + 1] <= left:
                after = self.BOUNDS[min(bucket + 1, len(self.BOUNDS) - 1)]
                return max(after - 1, self.BOUNDS[bucket])
        return MAX_TOKENS
