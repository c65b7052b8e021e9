"""A format of weights and its quantiser, written from outside the package.

    monkeypatch.setitem(QUANTIZERS, "toy", TOY)
    load_checkpoint(path, quantize="toy")

A scale for each output, and 31 steps: coarse, so that a matrix that was left as it is shows in
every logit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from sortserve.checkpoint.quantize import Quantizer
from sortserve.model.weight import LinearOp, Weight, WeightFormat

__all__ = ["TOY", "ToyFormat", "quantize_toy"]


class ToyFormat(WeightFormat):
    """``values`` int8 [O, I], ``scales`` [O, 1]."""

    name = "toy"

    def shape(self, weight: Weight) -> tuple[int, int]:
        num_outputs, num_inputs = weight.values.shape
        return num_outputs, num_inputs

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        assert weight.scales is not None
        return (weight.values * weight.scales).to(dtype)

    def linear(self, weight: Weight, bias_O: Tensor | None) -> LinearOp:
        return lambda x_TI: linear(x_TI, self.dequantize(weight, x_TI.dtype), bias_O)


def quantize_toy(matrix_OI: Tensor) -> Weight:
    scale_O1 = matrix_OI.float().abs().amax(1, keepdim=True) / 15
    return Weight((matrix_OI / scale_O1).round().to(torch.int8), scale_O1, ToyFormat())


TOY = Quantizer(make=quantize_toy, devices=("cpu",))
