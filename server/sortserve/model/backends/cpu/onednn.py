"""Linear layers by torch's bundled oneDNN, with weights in its own packed layout; bf16.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sortserve.model.backend import LinearOp
from sortserve.model.backends.reference.linear import ReferenceLinearBackend

__all__ = ["OneDnnLinearBackend"]


class OneDnnLinearBackend(ReferenceLinearBackend):
    """oneDNN with packed weights, through the operators that torch's own compiler uses."""

    name = "onednn"

    @staticmethod
    def is_available() -> bool:
        """Whether this build of torch and this CPU have what is needed."""
        try:
            packed = _onednn_pack(torch.zeros(16, 16, dtype=torch.bfloat16))
            _onednn_linear(torch.zeros(1, 16, dtype=torch.bfloat16), packed, None)
        except (AttributeError, RuntimeError, TypeError):  # private operators: they may change
            return False
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        packed = _onednn_pack(weight_OI)
        return lambda x_TI: _onednn_linear(x_TI, packed, bias_O)


def _onednn_pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)
    return packed


def _onednn_linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed, bias_O, "none", [], "")
    return y_TO
