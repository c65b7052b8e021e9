"""Second moments of the states that an exit's module reads, and the linear map they ask for.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments"]

RIDGE = 1e-3
"""Of the mean of the Gram matrix' diagonal, over dimensions of unit size."""


class Moments:
    """Sums over tokens of ``x x^T`` and ``x y^T``: states x of one exit, targets y; in float64."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._xx = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._xy = torch.zeros_like(self._xx)
        self._count = 0

    def add(self, x_TD: Tensor, y_TD: Tensor) -> None:
        """Count some tokens in."""
        self._xx += x_TD.T @ x_TD
        self._xy += x_TD.T @ y_TD
        self._count += x_TD.shape[0]

    def sizes(self) -> Tensor:
        """[D], the root mean square of each dimension of x."""
        return (self._xx.diagonal() / max(1, self._count)).sqrt().clamp(min=1e-6)

    def fit(self) -> Tensor:
        """[D, D], the W of ``y ~ W x`` by ridge regression."""
        size_D = self.sizes()
        # In dimensions of unit size one ridge suits all.
        xx = self._xx / size_D[:, None] / size_D[None, :]
        ridge = RIDGE * xx.diagonal().mean() * torch.eye(len(size_D)).to(xx)
        solution: Tensor = torch.linalg.solve(xx + ridge, self._xy / size_D[:, None])
        return solution.T / size_D
