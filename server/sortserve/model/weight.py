"""The matrix of a linear layer, in the format in which it is kept: what loaders hand to backends.

A format says what its values and scales mean, and is the definition of a product with them: in
torch, on any device. A backend that has a kernel of its own for a format is tested against that;
one that has none uses it.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PLAIN", "LinearOp", "PlainFormat", "StackedFormat", "Weight", "WeightFormat"]


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

    def nbytes(self, weight: Weight) -> int:
        """Bytes that a product reads of the matrix."""
        return weight.values.nbytes + (0 if weight.scales is None else weight.scales.nbytes)

    def concat(self, weights: Sequence[Weight]) -> Weight:
        """One matrix of the outputs of several, of which the first is in this format.

        A format that can join its values does so; else the parts stay what they are.
        """
        return Weight(torch.empty(0), None, StackedFormat(weights))


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
    def concat(weights: Sequence[Weight]) -> Weight:
        """One matrix of the outputs of several, in their order, whatever their formats."""
        first, *others = weights
        return first.format.concat(weights) if others else first

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
        """Bytes that a product reads of it."""
        return self.format.nbytes(self)

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

    def concat(self, weights: Sequence[Weight]) -> Weight:
        """See WeightFormat."""
        if any(weight.format is not self for weight in weights):
            return super().concat(weights)
        return Weight.plain(torch.cat([weight.values for weight in weights]))


class StackedFormat(WeightFormat):
    """Outputs in different formats, or in one whose values cannot be joined."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(sorted({part.format.name for part in parts}))

    def shape(self, weight: Weight) -> tuple[int, int]:
        """See WeightFormat."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """See WeightFormat."""
        return torch.cat([part.dequantize(dtype) for part in self.parts])

    def linear(self, weight: Weight, bias_O: Tensor | None) -> LinearOp:
        """Each part by its own format."""
        sizes = [part.shape[0] for part in self.parts]
        biases = [None] * len(sizes) if bias_O is None else torch.split(bias_O, sizes)
        linears = [
            part.format.linear(part, bias) for part, bias in zip(self.parts, biases, strict=True)
        ]
        return lambda x_TI: torch.cat([linear(x_TI) for linear in linears], dim=-1)

    def nbytes(self, weight: Weight) -> int:
        """See WeightFormat."""
        return sum(part.nbytes for part in self.parts)


PLAIN = PlainFormat()
