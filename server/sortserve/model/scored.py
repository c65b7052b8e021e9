"""Tokens of a step whose hidden states are wanted beside those of the rows' last ones.

Shape legend: T tokens of the step, N those of one exit that are wanted, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["AskedTokens", "ScoredTokens"]


@dataclass(frozen=True)
class AskedTokens:
    """Tokens of one exit whose hidden states are asked for."""

    tokens_N: Tensor
    """int64: their places in T."""
    context_lens: Sequence[int]
    """Of each the tokens of its row up to it, itself included."""


class ScoredTokens:
    """Which tokens, and what the decoder found for them.

    Args:
        tokens_by_exit: of each exit at which rows have such tokens.
    """

    def __init__(self, tokens_by_exit: Mapping[int, AskedTokens]) -> None:
        self._tokens_by_exit = tokens_by_exit
        self.hidden_by_exit: dict[int, Tensor] = {}
        """[N, D] of each exit, its module and norm applied."""

    def leave(self, exit_layer: int, hidden: Callable[[AskedTokens], Tensor]) -> None:
        """The rows of an exit have come to it.

        Args:
            exit_layer: the exit.
            hidden: the hidden states of tokens, through the exit's module.
        """
        asked = self._tokens_by_exit.get(exit_layer)
        if asked is not None:
            self.hidden_by_exit[exit_layer] = hidden(asked)
