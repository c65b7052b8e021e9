"""A grammar that tests read at a glance: a form to fill in, one character a token.

``?`` is any lower-case letter, every other character stands for itself and is forced. After a form
that ends with ``*`` letters may follow without end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sortserve.core.grammar import GrammarError

__all__ = ["Form", "FormMatcher"]

END = 0
LETTERS = frozenset(range(ord("a"), ord("z") + 1))


@dataclass(frozen=True)
class Form:
    form: str
    end: int = END
    fails_after: int | None = None

    @property
    def key(self) -> str:
        return self.form

    def start(self) -> FormMatcher:
        return FormMatcher(self)


class FormMatcher:
    def __init__(self, grammar: Form) -> None:
        self._grammar = grammar
        self._at = 0

    def fill_mask(self, mask_W: NDArray[np.int32]) -> None:
        mask_W[:] = 0
        for token_id in self._allowed():
            mask_W[token_id // 32] |= np.uint32(1 << token_id % 32).astype(np.int32)

    def _allowed(self) -> set[int]:
        form = self._grammar.form
        if self._at == self._grammar.fails_after:
            raise GrammarError("scripted failure")
        if self._at >= len(form.rstrip("*")):
            return {self._grammar.end} | (set(LETTERS) if form.endswith("*") else set())
        return set(LETTERS) if form[self._at] == "?" else {ord(form[self._at])}

    def accept(self, token_id: int) -> None:
        if token_id not in self._allowed():
            raise GrammarError(f"{chr(token_id)!r} at {self._at} of {self._grammar.form}")
        self._at += 1

    def forced_tokens(self) -> list[int]:
        form = self._grammar.form.rstrip("*")
        rest = form[self._at :]
        return list(map(ord, rest[: len(rest.split("?", 1)[0])]))

    @property
    def is_complete(self) -> bool:
        form = self._grammar.form
        return not form.endswith("*") and self._at >= len(form)
