"""The matrix of a linear layer, in the format in which it is kept: what loaders hand to backends.

A format says what its values and scales mean, and is the definition of a product with them: in
torch, on any device. A backend that has a kernel of its own for a format is tested against that;
one that has none uses it.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PLAIN", "LinearOp", "PlainFormat", "Weight", "WeightFormat"]


class LinearOp(Protocol):
    """A linear map with its weights inside: [T, I] to [T, O]."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Multiply."""
        ...


class WeightFormat(ABC):
    """How the elements of a matrix are kept."""

    name: str

    @abstractmethod
    def shape(self, weight: Weight) -> tuple[int, int]:
        """Outputs and inputs."""

    @abstractmethod
    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """The matrix itself, [O, I] in ``dtype``."""

    @abstractmethod
    def linear(self, weight: Weight, bias_O: Tensor | None) -> LinearOp:
        """``x W^T + b`` in the dtype of x."""


@dataclass(frozen=True, eq=False)
class Weight:
    """The matrix of a linear layer, [O, I]."""

    values: Tensor
    scales: Tensor | None
    format: WeightFormat

    @staticmethod
    def plain(weight_OI: Tensor) -> Weight:
        """A matrix of floats, as it is."""
        return Weight(weight_OI, None, PLAIN)

    @staticmethod
    def nothing() -> Weight:
        """What stands where a matrix was that is no longer needed."""
        return Weight.plain(torch.empty(0, 0))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.format.shape(self)

    @property
    def num_elements(self) -> int:
        """Elements of the matrix, however many bytes each takes."""
        num_outputs, num_inputs = self.shape
        return num_outputs * num_inputs

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix itself, [O, I] in ``dtype``."""
        return self.format.dequantize(self, dtype)


class PlainFormat(WeightFormat):
    """Floats: ``values`` is [O, I]; there are no scales."""

    name = "plain"

    def shape(self, weight: Weight) -> tuple[int, int]:
        """See WeightFormat."""
        num_outputs, num_inputs = weight.values.shape
        return num_outputs, num_inputs

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """See WeightFormat."""
        return weight.values.to(dtype)

    def linear(self, weight: Weight, bias_O: Tensor | None) -> LinearOp:
        """See WeightFormat."""
        weight_OI = weight.values
        return lambda x_TI: functional.linear(x_TI, weight_OI, bias_O)


PLAIN = PlainFormat()
