"""Find stop strings in a text that arrives in pieces, holding back no more than needed (no torch).

A request ends at the first character with which one of its stop strings is complete, wherever the
borders between the pieces were. Of several that are complete there, the longest is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

__all__ = ["StopMatcher"]


class StopMatcher:
    """Feeds on text, passes on what can no longer be part of a stop string.

    The cost is linear in the text and in the number of stop strings, whatever their lengths.
    """

    def __init__(self, stops: Sequence[str], *, keep_stop: bool = False) -> None:
        self._prefixes = [_MatchedPrefix(stop) for stop in stops]
        self._keep_stop = keep_stop
        self._held = ""
        self._hidden: list[tuple[int, int]] = []
        """What of ``_held`` is not to be shown, as (first, end)."""

    def push(
        self, text: str, *, may_stop: bool = True, is_hidden: bool = False
    ) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string ended it.

        With ``may_stop=False`` a stop string that becomes complete is passed over. With
        ``is_hidden`` the text counts, and is never shown.
        """
        if not self._prefixes:
            return "" if is_hidden else text, False
        seen = self._held + text
        if is_hidden:
            self._hidden.append((len(self._held), len(seen)))
        for index, character in enumerate(text, start=len(self._held) + 1):
            matched = max(prefix.advance(character) for prefix in self._prefixes)
            if matched and may_stop:
                end = index if self._keep_stop else index - matched
                shown = self._shown(seen, end)
                self._held, self._hidden = "", []
                return shown, True
        safe = len(seen) - max(prefix.length for prefix in self._prefixes)
        shown = self._shown(seen, safe)
        self._held = seen[safe:]
        if self._hidden:
            self._hidden = [(max(0, a - safe), b - safe) for a, b in self._hidden if b > safe]
        return shown, False

    def _shown(self, seen: str, end: int) -> str:
        """``seen[:end]`` without what is hidden."""
        for first, last in reversed(self._hidden):
            if first < end:
                seen = seen[:first] + seen[min(last, end) :]
                end -= min(last, end) - first
        return seen[:end]

    def flush(self) -> str:
        """The text held back; the stop strings it could have become never came."""
        held = self._shown(self._held, len(self._held))
        self._held, self._hidden = "", []
        return held


class _MatchedPrefix:
    """How much of one stop string the text ends with (the automaton of Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._fallback = _fallback_lengths(stop)
        self.length = 0

    def advance(self, character: str) -> int:
        """Take one character; the length of the stop string if it is now complete, else 0."""
        while self.length and self._stop[self.length] != character:
            self.length = self._fallback[self.length]
        if self._stop[self.length] == character:
            self.length += 1
        if self.length < len(self._stop):
            return 0
        self.length = self._fallback[self.length]
        return len(self._stop)


@lru_cache(maxsize=256)  # shared by the samples of a request
def _fallback_lengths(stop: str) -> list[int]:
    """For each n, the longest proper prefix of ``stop`` that ``stop[:n]`` ends with."""
    lengths = [0, 0]
    for character in stop[1:]:
        length = lengths[-1]
        while length and stop[length] != character:
            length = lengths[length]
        lengths.append(length + (stop[length] == character))
    return lengths
