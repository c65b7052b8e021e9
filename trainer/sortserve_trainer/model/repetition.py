"""Does an answer repeat itself? Two measures, over token ids."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

__all__ = ["ends_in_loop", "repeated_ngrams", "repeated_places"]

NGRAM = 4
MAX_PERIOD = 64
"""Longest block, in tokens, whose repetition is looked for: a long sentence."""
MIN_REPEATS = 3
MIN_LOOP_TOKENS = 16
"""Shorter tails are no loop: a rule of dashes, "ha ha ha", a row of a table."""


def repeated_ngrams(tokens: Sequence[Hashable], n: int = NGRAM) -> float:
    """The share of n-grams that occurred before in the same text, in [0, 1).

    1 - distinct / all, the "seq-rep-n" of Welleck et al. (arXiv 1908.04319); 0 for texts of fewer
    than n tokens.
    """
    count = len(tokens) - n + 1
    return len(repeated_places(tokens, n)) / count if count > 0 else 0.0


def repeated_places(tokens: Sequence[Hashable], n: int = NGRAM) -> list[int]:
    """Where a token completes an n-gram that occurred before in the same text, ascending."""
    seen: set[tuple[Hashable, ...]] = set()
    places = []
    for end in range(n, len(tokens) + 1):
        ngram = tuple(tokens[end - n : end])
        if ngram in seen:
            places.append(end - 1)
        seen.add(ngram)
    return places


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether a text ends in a block that came ``MIN_REPEATS`` times in a row or more.

    The block has at most ``MAX_PERIOD`` tokens, its last copy may be cut short, and all copies
    together have at least ``MIN_LOOP_TOKENS``.
    """
    return any(
        period + _copied_tail(tokens, period) >= max(MIN_REPEATS * period, MIN_LOOP_TOKENS)
        for period in range(1, min(MAX_PERIOD, len(tokens) // MIN_REPEATS) + 1)
    )


def _copied_tail(tokens: Sequence[int], period: int) -> int:
    """How many tokens at the end equal the token ``period`` places before them."""
    length = 0
    while length < len(tokens) - period and tokens[-1 - length] == tokens[-1 - length - period]:
        length += 1
    return length
