"""Numbers in JSON that come to an end: a model that repeats a digit would never close the document.

After so many digits in a row outside of strings a token that begins with one is left out, as long
as anything else may come. A number that a schema wants to be longer can be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sortserve.core.grammar import num_words

__all__ = ["MAX_DIGITS", "MAX_EXPONENT_DIGITS", "NumberGuard", "NumberTable"]

MAX_DIGITS = 20
"""In a row, before or after the point: every integer of 64 bits has fewer or as many."""
MAX_EXPONENT_DIGITS = 2
"""So that no number is too large for a float."""

_DIGITS = frozenset(b"0123456789")


class NumberTable:
    """Which tokens begin with a digit, and what all tokens are, for one vocabulary.

    Args:
        token_bytes: of each id.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.token_bytes = token_bytes
        begins = np.zeros(32 * num_words(len(token_bytes)), dtype=np.uint8)
        for token_id, data in enumerate(token_bytes):
            begins[token_id] = bool(data) and data[0] in _DIGITS
        self.others_W: NDArray[np.int32] = ~np.packbits(begins, bitorder="little").view("<i4")


class NumberGuard:
    """Where one JSON document stands: in a string, or in which part of a number."""

    def __init__(self, table: NumberTable) -> None:
        self._table = table
        self._in_string = self._escaped = self._in_exponent = False
        self._num_digits = 0

    def accept(self, token_id: int) -> None:
        """A token of the document has come."""
        for byte in self._table.token_bytes[token_id]:
            if self._in_string:
                self._in_string = self._escaped or byte != ord('"')
                self._escaped = byte == ord("\\") and not self._escaped
            elif byte in _DIGITS:
                self._num_digits += 1
            else:
                self._num_digits = 0
                self._in_exponent = byte in b"eE" or (self._in_exponent and byte in b"+-")
                self._in_string = byte == ord('"')

    def restrict(self, mask_W: NDArray[np.int32]) -> None:
        """Leave out tokens that make a number too long, unless nothing would be left."""
        most = MAX_EXPONENT_DIGITS if self._in_exponent else MAX_DIGITS
        if self._num_digits < most:
            return
        kept_W = mask_W & self._table.others_W[: len(mask_W)]
        if kept_W.any():
            mask_W[:] = kept_W
