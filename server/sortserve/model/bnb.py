"""Formats of bitsandbytes (NF4, FP4, LLM.int8()), computed by its own functional calls.

The same code serves CPU and CUDA. The library is imported where the first such weight is met.

A token's sums may be taken in another order beside other tokens, as with any product of torch; in
none of these formats does a token's value depend on what the others are.

Sources: Dettmers et al., LLM.int8() (2022) and QLoRA (2023); bitsandbytes' ``Linear4bit`` and
``Linear8bitLt``.

Shape legend: T tokens, I inputs, O outputs, C columns with an outlier.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sortserve.model.weight import LinearOp, Weight, WeightFormat

__all__ = [
    "BLOCK_SIZE",
    "OUTLIER_THRESHOLD",
    "EightBitFormat",
    "FourBitFormat",
    "four_bit_values",
    "quantize_eight_bit",
    "quantize_four_bit",
    "restore_eight_bit",
    "restore_four_bit",
    "restore_scales",
]

BLOCK_SIZE = 64
"""bitsandbytes' default."""
OUTLIER_THRESHOLD = 6.0
"""Transformers' default."""
_PACKED_OUTPUTS = 32
"""bitsandbytes' CPU kernel takes so many outputs at once."""


@dataclass(frozen=True)
class FourBitFormat(WeightFormat):
    """4 bits an element, a scale for each block of elements in the order of memory.

    ``values`` is uint8 [ceil(O I / 2), 1], two elements a byte, the first in the high half;
    ``scales`` is fp32 [blocks], each block's largest magnitude. Scales that were quantised
    themselves are kept in fp32: 0.4 bits an element more, and a step need not restore them.
    """

    name: str
    """``nf4`` or ``fp4``: which 16 values there are."""
    num_outputs: int
    num_inputs: int
    block_size: int

    def shape(self, weight: Weight) -> tuple[int, int]:
        """See WeightFormat."""
        return self.num_outputs, self.num_inputs

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """See WeightFormat."""
        state = self.quant_state(weight, dtype)
        matrix_OI: Tensor = _bitsandbytes().functional.dequantize_4bit(weight.values, state)
        return matrix_OI

    def linear(self, weight: Weight, bias_O: Tensor | None) -> LinearOp:
        """See WeightFormat."""
        return _FourBitLinear(self, weight, bias_O)

    def concat(self, weights: Sequence[Weight]) -> Weight:
        """Joined where every block but the last lies in one part."""
        formats = [weight.format for weight in weights]
        num_outputs = sum(weight.shape[0] for weight in weights)
        alike = all(
            isinstance(f, FourBitFormat) and replace(f, num_outputs=self.num_outputs) == self
            for f in formats
        )
        if not alike or any(w.num_elements % self.block_size for w in weights[:-1]):
            return super().concat(weights)
        return Weight(
            torch.cat([weight.values for weight in weights]),
            torch.cat([_scales(weight) for weight in weights]),
            replace(self, num_outputs=num_outputs),
        )

    def quant_state(self, weight: Weight, dtype: torch.dtype) -> Any:
        """What bitsandbytes wants to know beside the values; ``dtype`` is of the matrix."""
        bnb_functional = _bitsandbytes().functional
        return bnb_functional.QuantState(
            absmax=_scales(weight),
            shape=torch.Size(self.shape(weight)),
            code=bnb_functional.get_4bit_type(self.name, device=weight.values.device),
            blocksize=self.block_size,
            quant_type=self.name,
            dtype=dtype,
        )


class _FourBitLinear:
    """``matmul_4bit``; in bf16 on a CPU for which bitsandbytes has a kernel, that.

    The kernel wants an order of its own, which ``Linear4bit`` makes at its first call. It rounds
    the scales to bf16, so nothing but bf16 is given to it.
    """

    def __init__(self, format_: FourBitFormat, weight: Weight, bias_O: Tensor | None) -> None:
        self._format = format_
        self._weight: Weight | None = weight
        self._bias = bias_O
        self._state = format_.quant_state(weight, torch.float32)
        self._packed: Any = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See LinearOp."""
        if self._packed is None and self._can_pack(x_TI):
            self._packed = self._pack()
            self._weight = None  # the module has it, in its own order
        if self._packed is not None:
            assert x_TI.dtype == torch.bfloat16, "the dtype of the first call"
            y_TO: Tensor = self._packed(x_TI)
            return y_TO
        assert self._weight is not None
        values = self._weight.values.t()
        y_TO = _bitsandbytes().matmul_4bit(x_TI, values, quant_state=self._state, bias=self._bias)
        return y_TO

    def _can_pack(self, x_TI: Tensor) -> bool:
        return (
            x_TI.device.type == "cpu"
            and x_TI.dtype == torch.bfloat16
            and self._format.num_outputs % _PACKED_OUTPUTS == 0
            and self._format.num_inputs % self._format.block_size == 0
            and _has_cpu_kernel()
        )

    def _pack(self) -> Any:
        assert self._weight is not None
        bnb, format_ = _bitsandbytes(), self._format
        layer = bnb.nn.Linear4bit(
            format_.num_inputs,
            format_.num_outputs,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type=format_.name,
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            self._weight.values,
            requires_grad=False,
            quant_state=self._state,
            blocksize=format_.block_size,
            quant_type=format_.name,
            bnb_quantized=True,
            module=layer,
        )
        if self._bias is not None:
            layer.bias = torch.nn.Parameter(self._bias, requires_grad=False)
        return layer.eval()


@dataclass(frozen=True)
class EightBitFormat(WeightFormat):
    """LLM.int8(): 8 bits an element, a scale for each output.

    ``values`` is int8 [O, I]; ``scales`` is fp32 [O], each output's largest magnitude, which 127
    stands for. In fp32 nothing but the weights is rounded. In other dtypes inputs are rounded to
    8 bits, too, with a scale for each token, but for outliers, whose products are computed in the
    dtype of x.

    bitsandbytes takes a column out of the 8-bit product for all tokens once it is an outlier in
    one. Here it is that token's affair alone, so that no token depends on its neighbours: what a
    token gives is what bitsandbytes makes of it alone.
    """

    threshold: float
    """An input of this magnitude is an outlier; 0: none is."""
    name: str = "int8-bnb"

    def shape(self, weight: Weight) -> tuple[int, int]:
        """See WeightFormat."""
        num_outputs, num_inputs = weight.values.shape
        return num_outputs, num_inputs

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """See WeightFormat."""
        dequantize = _bitsandbytes().functional.int8_vectorwise_dequant
        matrix_OI: Tensor = dequantize(weight.values, _scales(weight))
        return matrix_OI.to(dtype)

    def linear(self, weight: Weight, bias_O: Tensor | None) -> LinearOp:
        """See WeightFormat."""

        def linear(x_TI: Tensor) -> Tensor:
            if x_TI.dtype == torch.float32:
                return functional.linear(x_TI, self.dequantize(weight, torch.float32), bias_O)
            return self._llm_int8(weight, bias_O, x_TI)

        return linear

    def _llm_int8(self, weight: Weight, bias_O: Tensor | None, x_TI: Tensor) -> Tensor:
        bnb_functional = _bitsandbytes().functional
        half_TI = x_TI.to(torch.float16)
        outliers_TI = None
        if self.threshold > 0 and bool((half_TI.abs() >= self.threshold).any()):
            outliers_TI = half_TI.abs() >= self.threshold
            half_TI = half_TI.masked_fill(outliers_TI, 0)
        rounded_TI, scales_T, _ = bnb_functional.int8_vectorwise_quant(half_TI)
        y_TO: Tensor = torch.ops.bitsandbytes.int8_scaled_mm(
            rounded_TI, weight.values, scales_T, _scales(weight), bias=bias_O, dtype=x_TI.dtype
        )
        if outliers_TI is None:
            return y_TO
        columns_C = outliers_TI.any(dim=0).nonzero()[:, 0]
        x_TC = x_TI.masked_fill(~outliers_TI, 0)[:, columns_C]
        matrix_OC = bnb_functional.int8_vectorwise_dequant(
            weight.values[:, columns_C].contiguous(), _scales(weight)
        )
        return y_TO.addmm(x_TC, matrix_OC.to(x_TI.dtype).t())

    def concat(self, weights: Sequence[Weight]) -> Weight:
        """See WeightFormat."""
        if any(weight.format != self for weight in weights):
            return super().concat(weights)
        return Weight(
            torch.cat([weight.values for weight in weights]),
            torch.cat([_scales(weight) for weight in weights]),
            self,
        )


def quantize_four_bit(matrix_OI: Tensor, kind: str = "nf4") -> Weight:
    """A plain matrix in 4 bits; ``kind`` is ``nf4`` or ``fp4``."""
    quantize = _bitsandbytes().functional.quantize_4bit
    values, state = quantize(matrix_OI, blocksize=BLOCK_SIZE, quant_type=kind)
    num_outputs, num_inputs = matrix_OI.shape
    format_ = FourBitFormat(kind, num_outputs, num_inputs, BLOCK_SIZE)
    return Weight(values, state.absmax, format_)


def restore_four_bit(values: Tensor, scales: Tensor | None, shape: tuple[int, int]) -> Weight:
    """What ``quantize_four_bit`` made of a matrix of this shape in nf4."""
    return Weight(values, scales, FourBitFormat("nf4", *shape, BLOCK_SIZE))


def quantize_eight_bit(matrix_OI: Tensor) -> Weight:
    """A plain matrix in 8 bits."""
    quantize = _bitsandbytes().functional.int8_vectorwise_quant
    values, scales, _ = quantize(matrix_OI.to(torch.float16))
    return Weight(values, scales, EightBitFormat(OUTLIER_THRESHOLD))


def restore_eight_bit(values: Tensor, scales: Tensor | None, shape: tuple[int, int]) -> Weight:
    """What ``quantize_eight_bit`` made of a matrix of this shape."""
    assert tuple(values.shape) == shape
    return Weight(values, scales, EightBitFormat(OUTLIER_THRESHOLD))


def restore_scales(
    codes: Tensor, nested_scales: Tensor, values: Tensor, block_size: int, offset: float
) -> Tensor:
    """Scales that were quantised themselves ("double quantisation"), in fp32.

    Args:
        codes: uint8 [blocks].
        nested_scales: fp32, one for each ``block_size`` of them.
        values: fp32 [256], what the codes stand for.
        block_size: of the scales.
        offset: added to all.
    """
    dequantize = _bitsandbytes().functional.dequantize_blockwise
    restored: Tensor = dequantize(codes, absmax=nested_scales, code=values, blocksize=block_size)
    return restored + offset


def four_bit_values(kind: str) -> Tensor:
    """The 16 values of ``nf4`` or ``fp4``, by their codes."""
    values: Tensor = _bitsandbytes().functional.get_4bit_type(kind, device="cpu")
    return values


def _scales(weight: Weight) -> Tensor:
    assert weight.scales is not None
    return weight.scales


@cache
def _bitsandbytes() -> Any:
    # It tells everyone of kernels that it would download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


@cache
def _has_cpu_kernel() -> bool:
    """Whether ``Linear4bit`` has a kernel for this CPU: AVX-512 BF16, from 0.49 on."""
    layer = _bitsandbytes().nn.Linear4bit(BLOCK_SIZE, _PACKED_OUTPUTS, device="meta")
    return bool(getattr(layer, "support_avx512bf16_for_cpu", False))
