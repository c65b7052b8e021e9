"""How long answers get, learned from those that ended (no torch).

Lengths are counted in buckets of growing width. Each bucket has a hazard: of the answers that
reached it, the share that ended in it of their own accord. Answers cut by ``max_tokens`` or by a
deadline count as having got so far and say nothing of where they would have ended (Kaplan and
Meier, 1958). The same table answers for a request that has run for a while, from its bucket on.

Callers differ: one asks for a word and the next for a page. So there is a table for each class of
requests (its caller's route and model, see ``Request.length_class``) and size of prompt, one for
each class and one for all; a request is planned with the first of them that has seen enough.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from sortserve.core.request import Request

__all__ = ["LengthEstimator", "LengthKey", "expected_tokens"]

MIN_ENDED = 20
"""A table with fewer answers that ended says nothing."""
FORGET = 0.998
"""The weight of an answer in its table after each later one there: about five hundred count."""
GROWTH = 1.25
MAX_TOKENS = 1 << 20
MAX_TABLES = 256
"""Some KiB each. Beyond them the table that was of the least use goes."""
FADE = 0.999
"""The weight of a table that nothing is added to, after each answer that is added to another: one
that nobody has used for some thousand answers makes room for any that is used now."""


class LengthKey(NamedTuple):
    """Whose answers are alike."""

    length_class: tuple[str, ...] = ()
    """See ``Request.length_class``."""
    prompt_bucket: int | None = None
    """Of the prompt's length, each four times as wide as the one before; None: any."""

    @classmethod
    def of(cls, request: Request) -> LengthKey:
        """The narrowest that a request belongs to."""
        return cls(request.length_class, len(request.prompt_token_ids).bit_length() // 2)


EVERYBODY = LengthKey()


@lru_cache(maxsize=1024)
def _levels(key: LengthKey) -> tuple[LengthKey, ...]:
    """A key and what it is a part of, the narrowest first; the last is everybody."""
    return tuple(dict.fromkeys((key, LengthKey(key.length_class), EVERYBODY)))


def _bounds() -> tuple[int, ...]:
    """1, 2, 3, ... and then a quarter wider each: the first length of each bucket."""
    bounds = [1]
    while bounds[-1] < MAX_TOKENS:
        bounds.append(max(bounds[-1] + 1, int(bounds[-1] * GROWTH)))
    return tuple(bounds)


def expected_tokens(request: Request, num_so_far: int, lengths: LengthEstimator) -> int:
    """The output tokens to plan a request for, given how many it has.

    Those that a grammar forces are left out: they take no step of their own, and next to no time.
    """
    limit = request.sampling.max_tokens
    share = 1.0 if request.grammar is None else lengths.sampled_share(request.grammar.key)
    if request.grammar is None and request.sampling.ignore_eos and not request.sampling.stop:
        return limit
    learned = lengths.expect(num_so_far, limit, LengthKey.of(request))
    if learned is not None:
        return learned
    guess = limit if request.expected_tokens is None else request.expected_tokens
    guess = max(1, round(share * guess))
    if num_so_far >= guess:  # longer than thought: a quarter more, and again
        guess = num_so_far + max(1, num_so_far // 4)
    return min(guess, limit)


class LengthEstimator:
    """Quantiles of the number of output tokens, given how many have come.

    One thread observes; any may ask at the same time. What a table has learned is one frozen
    value, and replaced as a whole.

    Args:
        quantile: of the answers that are still running, the share that the estimate shall cover.
    """

    BOUNDS = _bounds()

    def __init__(self, quantile: float = 0.9) -> None:
        assert 0.0 < quantile < 1.0
        nothing = (0.0,) * len(self.BOUNDS)
        self._nothing = _Learned(quantile, nothing, nothing, 0.0)
        self._tables: dict[LengthKey, _Learned] = {}
        # Of each table: its weight when it was last added to, and how many answers there had been.
        self._uses: dict[LengthKey, tuple[float, int]] = {}
        self._num_answers = 0
        # Sampled and all tokens of the answers to each grammar, and to all of them ("").
        self._sampled: dict[str, tuple[float, float]] = {}

    @property
    def num_tables(self) -> int:
        """How many classes are remembered: at most ``MAX_TABLES``."""
        return len(self._tables)

    def observe(self, num_tokens: int, *, cut: bool, key: LengthKey = EVERYBODY) -> None:
        """Learn from an answer of so many tokens.

        Args:
            num_tokens: its length.
            cut: it did not end of its own accord.
            key: whose it was.
        """
        if num_tokens < 1:
            return
        self._num_answers += 1
        for level in _levels(key):
            table = self._tables.get(level, self._nothing)
            self._tables[level] = table.and_one(num_tokens, cut=cut)
            self._uses[level] = (1.0 + self._usefulness(level), self._num_answers)
        while len(self._tables) > MAX_TABLES:
            least = min((k for k in self._tables if k != EVERYBODY), key=self._usefulness)
            del self._tables[least], self._uses[least]

    def observe_forced(self, num_sampled: int, num_tokens: int, key: str) -> None:
        """Learn how much of an answer its grammar forced.

        Args:
            num_sampled: tokens that it did not force.
            num_tokens: all of them.
            key: of the grammar.
        """
        for known in (key, ""):
            sampled, total = self._sampled.pop(known, (0.0, 0.0))
            self._sampled[known] = (FORGET * sampled + num_sampled, FORGET * total + num_tokens)
        while len(self._sampled) > MAX_TABLES:
            del self._sampled[next(iter(self._sampled))]  # the one that is longest ago

    def sampled_share(self, key: str) -> float:
        """The share of tokens that a grammar does not force: its own, else that of all of them."""
        sampled, total = self._sampled.get(key) or self._sampled.get("", (1.0, 1.0))
        return sampled / total if total > 0.0 else 1.0

    def expect(self, num_so_far: int, max_tokens: int, key: LengthKey = EVERYBODY) -> int | None:
        """The total length to plan for: above what has come, at most ``max_tokens``.

        None before enough answers have ended.

        Args:
            num_so_far: tokens that have come.
            max_tokens: the limit.
            key: whose answer it is.
        """
        for level in _levels(key):
            learned = self._tables.get(level)
            if learned is not None and learned.weight >= MIN_ENDED:
                total = learned.totals[_bucket(num_so_far + 1)]
                return min(max(total, num_so_far + 1), max_tokens)
        return None

    def _usefulness(self, key: LengthKey) -> float:
        """How many answers a table has had, each worth less with every one that others have had."""
        weight, last = self._uses.get(key, (0.0, self._num_answers))
        return float(weight * FADE ** (self._num_answers - last))


def _bucket(num_tokens: int) -> int:
    """Of a length of at least one."""
    return bisect.bisect_right(LengthEstimator.BOUNDS, num_tokens) - 1


@dataclass(frozen=True)
class _Learned:
    """The answers of one table, by bucket."""

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
        ascending = [-share for share in survival]
        return [self._quantile_from(start, ascending) for start in range(len(self.ended))]

    def _quantile_from(self, start: int, ascending: list[float]) -> int:
        bounds = LengthEstimator.BOUNDS
        if ascending[start] >= 0.0:
            return bounds[start]
        left = ascending[start] * (1.0 - self.quantile)
        bucket = bisect.bisect_left(ascending, left, lo=start + 1) - 1
        if bucket >= len(bounds):
            return MAX_TOKENS
        after = bounds[min(bucket + 1, len(bounds) - 1)]
        return max(after - 1, bounds[bucket])
