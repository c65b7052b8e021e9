"""What an answer must look like, and where one answer stands in it (no torch, no library).

A *grammar* is compiled once and shared; a *matcher* is one answer's place in it; a *constraint* is
what a sequence keeps of both. Some tokens are *forced*: the grammar leaves no choice of what comes
next, so they need no logits. A sequence takes them at once, and the next step reads them in one
chunk, or one by one as if they had been sampled; they are the same tokens either way.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Constraint",
    "Grammar",
    "GrammarError",
    "Matcher",
    "OutputFormat",
    "clear",
    "length_class_of",
    "num_words",
]

Words = NDArray[np.int32]
"""A bit for each token of the vocabulary: token t is bit ``t % 32`` of word ``t // 32``."""


class GrammarError(Exception):
    """A matcher cannot go on: this answer fails, and no other."""


@dataclass(frozen=True)
class OutputFormat:
    """What a client wants an answer to look like: checked for its form, not compiled."""

    kind: str
    """``json`` (a schema), ``regex``, ``choice`` (a list of strings) or ``grammar``."""
    text: str
    """A schema and a list of choices as JSON."""
    param: str = "format"
    """The field that it came from, for errors."""
    places: tuple[tuple[str, str], ...] = ()
    """Places in it, and where a client wrote what stands there; the first that fits counts."""

    @cached_property
    def key(self) -> str:
        """The same for formats that mean the same; no client's words are in it."""
        return hashlib.sha256(f"{self.kind}\0{self.text}".encode()).hexdigest()


class Matcher(Protocol):
    """One answer's place in a grammar. Methods raise ``GrammarError`` where it cannot go on."""

    def fill_mask(self, mask_W: Words) -> None:
        """Set the bits of the tokens that may come next, and clear all others.

        The tokens that end a generation are among them where the answer may end here.
        """

    def accept(self, token_id: int) -> None:
        """A token has come."""

    def forced_tokens(self) -> list[int]:
        """What must come next, in order; empty where there is a choice."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can be added."""


class Grammar(Protocol):
    """Compiled, and shared by all answers that must match it."""

    @property
    def key(self) -> str:
        """As of its ``OutputFormat``."""

    def start(self) -> Matcher:
        """The place of an answer that has not begun."""


class Constraint:
    """A sequence's matcher, and the tokens that are forced but have not come yet.

    Args:
        matcher: of an answer that has not begun.
        one_by_one: forced tokens are sampled like any other, each the only one allowed.
        no_ends: the tokens that end a generation but not this one (``ignore_eos``).
    """

    def __init__(
        self, matcher: Matcher, *, one_by_one: bool = False, no_ends: Collection[int] = ()
    ) -> None:
        self._matcher = matcher
        self._one_by_one = one_by_one
        self._no_ends = no_ends
        self._forced = deque(matcher.forced_tokens())

    def fill_mask(self, mask_W: Words, without: Collection[int] = ()) -> None:
        """Set the bits of the tokens that may come next, and clear all others.

        Asking changes nothing, so a step that failed may ask again.

        Args:
            mask_W: ``num_words`` of the vocabulary.
            without: tokens that may not come either, unless nothing else is left.

        Raises:
            GrammarError: nothing may come.
        """
        if self._forced:
            mask_W[:] = 0
            token_id = self._forced[0]
            mask_W[token_id // 32] = np.uint32(1 << token_id % 32).astype(np.int32)
            return
        self._matcher.fill_mask(mask_W)
        for unwanted in (self._no_ends, without):
            if unwanted:
                kept_W = clear(mask_W, unwanted)
                if kept_W.any():
                    mask_W[:] = kept_W
        if not np.count_nonzero(mask_W):  # a third of what any() takes
            raise GrammarError("no token can follow")

    def accept(self, token_id: int) -> None:
        """A token has come, sampled or forced."""
        if self._forced:
            expected = self._forced.popleft()
            assert token_id == expected, f"token {token_id} where {expected} was forced"
        self._matcher.accept(token_id)
        if not self._forced and not self._matcher.is_complete:
            self._forced.extend(self._matcher.forced_tokens())

    def next_forced(self) -> int | None:
        """The token to take now without a step, to be accepted; None: it must be sampled."""
        return None if self._one_by_one or not self._forced else self._forced[0]

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can be added."""
        return not self._forced and self._matcher.is_complete


def length_class_of(length_class: tuple[str, ...], grammar: Grammar | None) -> tuple[str, ...]:
    """Whose answers are about as long, where they must match the same grammar."""
    return length_class if grammar is None else (*length_class, grammar.key)


def num_words(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // 32)


def clear(mask_W: Words, token_ids: Collection[int]) -> Words:
    """A copy of a mask without these tokens; ids outside it are none of its bits."""
    bits_W = mask_W.copy()
    for token_id in token_ids:
        if 0 <= token_id < 32 * len(bits_W):
            bits_W[token_id // 32] &= np.int32(~np.uint32(1 << token_id % 32).astype(np.int32))
    return bits_W
