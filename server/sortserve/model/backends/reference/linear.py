"""Linear layers in plain torch: any device, any dtype, the weights as they are.

Shape legend: T tokens, I inputs, O outputs, F intermediate.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from sortserve.model.backend import LinearOp, Ops

__all__ = ["ReferenceLinearBackend"]


class ReferenceLinearBackend:
    """Plain torch: the weights as they are."""

    name = "reference"

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        return lambda x_TI: functional.linear(x_TI, weight_OI, bias_O)

    def gated(self, weight_2FI: Tensor, bias_2F: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        linear = self.linear(weight_2FI, bias_2F)
        return lambda x_TI: self._ops.silu_and_mul(linear(x_TI))

    def head(self, weight_OI: Tensor) -> LinearOp:
        """See LinearBackend."""
        linear = self.linear(weight_OI)
        return lambda x_TI: linear(x_TI).float()
