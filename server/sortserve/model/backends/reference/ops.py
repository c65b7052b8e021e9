"""The small operations of a decoder layer in plain torch.

Shape legend: T tokens, D hidden, F intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

__all__ = ["ReferenceOps"]


class ReferenceOps:
    """Any device, any dtype; the definition that faster versions are tested against."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``x / rms(x) * weight`` over the last dimension."""
        x_fp32 = x_TD.float()
        scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
        return (x_fp32 * scale * weight_D.float()).to(x_TD.dtype)

    def add_rms_norm(self, h_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``h += delta`` in place, then the norm of h."""
        h_TD += delta_TD
        return self.rms_norm(h_TD, weight_D, eps)

    def silu_and_mul(self, gate_up_TF: Tensor) -> Tensor:
        """``silu(gate) * up`` of the two halves: [T, 2F] to [T, F]."""
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return silu(gate_TF) * up_TF
