"""Tokens of a step whose hidden states are wanted beside those of the rows' last ones.

Shape legend: T tokens of the step, N those of one exit that are wanted, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

__all__ = ["ScoredTokens"]


class ScoredTokens:
    """Which tokens, and what the decoder found for them.

    Args:
        tokens_by_exit: of each exit at which rows have such tokens, int64 [N]: their places in T.
    """

    def __init__(self, tokens_by_exit: Mapping[int, Tensor]) -> None:
        self._tokens_by_exit = tokens_by_exit
        self.hidden_by_exit: dict[int, Tensor] = {}
        """[N, D] of each exit, its module and norm applied."""

    def leave(self, exit_layer: int, hidden: Callable[[Tensor], Tensor]) -> None:
        """The rows of an exit have come to it.

        Args:
            exit_layer: the exit.
            hidden: places in T to hidden states, through the exit's module.
        """
        token_N = self._tokens_by_exit.get(exit_layer)
        if token_N is not None:
            self.hidden_by_exit[exit_layer] = hidden(token_N)
