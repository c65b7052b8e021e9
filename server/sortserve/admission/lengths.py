"""How long answers get, learned from those that ended (no torch).

Lengths are counted in buckets of growing width. Each bucket has a hazard: of the answers that
reached it, the share that ended in it of their own accord. Answers cut by ``max_tokens`` or by a
deadline count as having got so far and say nothing of where they would have ended (Kaplan and
Meier, 1958). The same table answers for a request that has run for a while, from its bucket on.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from functools import cached_property

from sortserve.core.request import Request

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


def expected_tokens(request: Request, num_so_far: int, lengths: LengthEstimator) -> int:
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

    One thread observes; any may ask at the same time. What was learned is one frozen value, and
    replaced as a whole.

    Args:
        quantile: of the answers that are still running, the share that the estimate shall cover.
    """

    BOUNDS = _bounds()

    def __init__(self, quantile: float = 0.9) -> None:
        assert 0.0 < quantile < 1.0
        nothing = (0.0,) * len(self.BOUNDS)
        self._learned = _Learned(quantile, nothing, nothing, 0.0)

    def observe(self, num_tokens: int, *, cut: bool) -> None:
        """Learn from an answer of so many tokens.

        Args:
            num_tokens: its length.
            cut: it did not end of its own accord.
        """
        if num_tokens >= 1:
            self._learned = self._learned.and_one(num_tokens, cut=cut)

    def expect(self, num_so_far: int, max_tokens: int) -> int | None:
        """The total length to plan for: above what has come, at most ``max_tokens``.

        None before enough answers have ended.
        """
        learned = self._learned
        if learned.weight < MIN_ENDED:
            return None
        total = learned.totals[_bucket(num_so_far + 1)]
        return min(max(total, num_so_far + 1), max_tokens)


def _bucket(num_tokens: int) -> int:
    """Of a length of at least one."""
    return bisect.bisect_right(LengthEstimator.BOUNDS, num_tokens) - 1


@dataclass(frozen=True)
class _Learned:
    """The answers seen so far, by bucket."""

    quantile: float
    ended: tuple[float, ...]
    cut: tuple[float, ...]
    weight: float
    """Of the answers that ended of their own accord."""

    def and_one(self, num_tokens: int, *, cut: bool) -> _Learned:
        ended = [FORGET * weight for weight in self.ended]
        cut_off = [FORGET * weight for weight in self.cut]
        (cut_off if cut else ended)[_bucket(num_tokens)] += 1.0
        weight = FORGET * self.weight + (not cut)
        return _Learned(self.quantile, tuple(ended), tuple(cut_off), weight)

    @cached_property
    def totals(self) -> list[int]:
        """For each bucket: the length that the wanted share of answers reaching it stays within.

        Two threads that ask first at the same time both work it out, to the same end.
        """
        both = [e + c for e, c in zip(self.ended, self.cut, strict=True)]
        at_risk = list(itertools.accumulate(reversed(both)))[::-1]
        survival = [1.0]  # at the start of each bucket
        for ended, risk in zip(self.ended, at_risk, strict=True):
            survival.append(survival[-1] * (1.0 - ended / risk if risk > 0 else 1.0))
        return [self._quantile_from(start, survival) for start in range(len(self.ended))]

    def _quantile_from(self, start: int, survival: list[float]) -> int:
        bounds = LengthEstimator.BOUNDS
        if survival[start] <= 0.0:
            return bounds[start]
        left = survival[start] * (1.0 - self.quantile)
        for bucket in range(start, len(bounds)):
            if survival[bucket + 1] <= left:
                after = bounds[min(bucket + 1, len(bounds) - 1)]
                return max(after - 1, bounds[bucket])
        return MAX_TOKENS
