"""Second moments of the states that an exit's module reads, and the linear map they ask for.

Shape legend: T tokens, F features (the dimensions of x), D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments"]

RIDGE = 1e-3
"""Of the mean of the Gram matrix' diagonal, over dimensions of unit size."""


class Moments:
    """Sums over tokens of ``x x^T`` and ``x y^T``, in float64: features x, targets y."""

    def __init__(self) -> None:
        self._xx = self._xy = torch.zeros(())
        self._count = 0

    def add(self, x_TF: Tensor, y_TD: Tensor) -> None:
        """Count some tokens in."""
        x_TF = x_TF.double()
        self._xx = self._xx + x_TF.T @ x_TF
        self._xy = self._xy + x_TF.T @ y_TD.double()
        self._count += x_TF.shape[0]

    def sizes(self) -> Tensor:
        """[F], the root mean square of each dimension of x."""
        return (self._xx.diagonal() / max(1, self._count)).sqrt().clamp(min=1e-6)

    def fit(self) -> Tensor:
        """[D, F], the W of ``y ~ W x`` by ridge regression."""
        size_F = self.sizes()
        # In dimensions of unit size one ridge suits all.
        xx = self._xx / size_F[:, None] / size_F[None, :]
        ridge = RIDGE * xx.diagonal().mean() * torch.eye(len(size_F)).to(xx)
        solution: Tensor = torch.linalg.solve(xx + ridge, self._xy / size_F[:, None])
        return solution.T / size_F
