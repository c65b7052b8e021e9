"""int8 weights, a scale for every 32 inputs, and products with int8 activations: the definition.

A block of 32 inputs of an output is ``values * scale``, values from -127 to 127. Activations are
quantised in the same blocks when they are multiplied, so that the products of a block are summed as
integers; scales make them fp32, in which blocks are summed. Inputs that are no multiple of 32 are
filled up with zeros. The C++ kernels (``backends/cpu/kernels/linear_int8.cpp``) quantise
activations to the same bits and are tested against ``Int8Format.linear``.

On other devices than a CPU only the weights are int8 (``multiply_weight_only``): a GPU has nothing
of ours that multiplies in blocks, and rounding activations would cost precision and save nothing.

Shape legend: T tokens, I inputs, O outputs, B blocks of 32 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sortserve.model.weight import LinearOp, Weight, WeightFormat

__all__ = [
    "BLOCK_SIZE",
    "INT8",
    "Int8Format",
    "multiply_weight_only",
    "quantize_activations",
    "quantize_int8",
    "restore_int8",
]

BLOCK_SIZE = 32
"""Inputs that share a scale."""
_LARGEST = 127
_TINY = 2.0**-100
"""A block of numbers that are all smaller counts as zero: its factor would not be finite."""


class Int8Format(WeightFormat):
    """``values`` int8 [O, I], ``scales`` bf16 [O, B]."""

    name = "int8"

    def shape(self, weight: Weight) -> tuple[int, int]:
        """See WeightFormat."""
        num_outputs, num_inputs = weight.values.shape
        return num_outputs, num_inputs

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """See WeightFormat."""
        assert weight.scales is not None
        # In bf16 as good as in fp32: a product of an integer below 128 and a bf16 is rounded once.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return _dequantize(weight.values, weight.scales.to(exact)).to(dtype)

    def linear(self, weight: Weight, bias_O: Tensor | None) -> LinearOp:
        """See WeightFormat; on a CPU in fp32, rounded once."""
        if weight.values.device.type != "cpu":
            return lambda x_TI: multiply_weight_only(x_TI, weight, bias_O)
        return lambda x_TI: self._multiply(x_TI, weight, bias_O)

    def _multiply(self, x_TI: Tensor, weight: Weight, bias_O: Tensor | None) -> Tensor:
        rounded_TI = _dequantize(*quantize_activations(x_TI))
        bias_O = None if bias_O is None else bias_O.float()
        return linear(rounded_TI, self.dequantize(weight, torch.float32), bias_O).to(x_TI.dtype)


INT8 = Int8Format()


def multiply_weight_only(x_TI: Tensor, weight: Weight, bias_O: Tensor | None) -> Tensor:
    """``x W^T + b`` with activations as they are, in the dtype of x.

    The matrix is made whole for the product.
    """
    return linear(x_TI, weight.format.dequantize(weight, x_TI.dtype), bias_O)


def quantize_int8(weight_OI: Tensor) -> Weight:
    """A matrix of floats in int8; each output on its own.

    The largest of a block becomes 127 or -127. Its scale is rounded to bf16 before the others are
    divided by it, so that rounding it costs next to nothing.
    """
    blocks_OB32 = _blocks(weight_OI)
    scales_OB = (blocks_OB32.abs().amax(-1) / _LARGEST).bfloat16()
    factors_OB = torch.where(scales_OB > 0, 1 / scales_OB.float(), 0)
    values_OB32 = (blocks_OB32 * factors_OB[..., None]).round_().clamp_(-_LARGEST, _LARGEST)
    values_OI = values_OB32.to(torch.int8).flatten(1)[:, : weight_OI.shape[1]]
    return Weight(values_OI.contiguous(), scales_OB, INT8)


def restore_int8(values: Tensor, scales: Tensor | None, shape: tuple[int, int]) -> Weight:
    """What ``quantize_int8`` made of a matrix of this shape."""
    assert tuple(values.shape) == shape
    return Weight(values, scales, INT8)


def quantize_activations(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels multiply by, to the bit: int8 [T, I] and fp32 scales [T, B].

    To the nearest integer, ties to even. A block with an infinity or a NaN has a scale that is
    none either, so that what is multiplied by it shows that.
    """
    blocks_TB32 = _blocks(x_TI)
    largest_TB = blocks_TB32.abs().amax(-1)
    is_zero_TB = largest_TB < _TINY
    most_TB = torch.full_like(largest_TB, _LARGEST)  # with a number torch may not divide
    scales_TB = torch.where(is_zero_TB, 0, largest_TB / most_TB)
    factors_TB = torch.where(is_zero_TB, 0, most_TB / largest_TB)
    values_TB32 = (blocks_TB32 * factors_TB[..., None]).round_().nan_to_num_(0)
    return values_TB32.to(torch.int8).flatten(1)[:, : x_TI.shape[1]], scales_TB


def _blocks(x_NI: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, I] to [N, B, 32] in ``dtype``."""
    num_rows, num_inputs = x_NI.shape
    num_blocks = -(-num_inputs // BLOCK_SIZE)
    padded = pad(x_NI.to(dtype), (0, num_blocks * BLOCK_SIZE - num_inputs))
    return padded.view(num_rows, num_blocks, BLOCK_SIZE)


def _dequantize(values_NI: Tensor, scales_NB: Tensor) -> Tensor:
    """[N, I] in the dtype of the scales."""
    return (_blocks(values_NI, scales_NB.dtype) * scales_NB[..., None]).flatten(1)[
        :, : values_NI.shape[1]
    ]
