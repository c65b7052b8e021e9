"""Linear layers in int8 by the C++ kernels; ``sortserve.model.quantization`` defines the format.

Shape legend: T tokens, I inputs, O outputs, F intermediate.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sortserve.model.backends.cpu.library import DTYPE_CODES, NativeLibrary, pointer
from sortserve.model.backends.cpu.linear import Matrix, Output, pack_bias
from sortserve.model.quantization import INT8
from sortserve.model.weight import Weight

__all__ = ["NativeInt8Linear", "can_pack_int8"]


class _LinearInt8Call(ctypes.Structure):
    """LinearInt8Call of ``kernels/linear_int8.cpp``."""

    _fields_ = (
        ("matrix", Matrix),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_tokens", "dtype", "num_threads")),
    )


class _PackInt8Call(ctypes.Structure):
    """PackInt8Call of ``kernels/linear_int8.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "scales", "packed")),
        *((name, ctypes.c_int64) for name in ("num_inputs", "num_outputs", "output")),
        *((name, ctypes.c_int64) for name in ("num_threads", "packed_bytes")),
    )


def can_pack_int8(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this weight and inputs of this dtype."""
    return weight.format is INT8 and dtype in {torch.float32, torch.bfloat16}


class NativeInt8Linear:
    """One weight matrix, packed for the int8 kernel.

    Args:
        library: the kernels.
        weight: one that ``can_pack_int8``; with Output.SILU_MUL all gates, then all ups.
        bias_O: as the weight's outputs.
        output: what becomes of the sums.
        dtype: of the inputs, and of the outputs unless they are Output.FP32.

    Attributes:
        matrix: the kernel's view of it; valid as long as this object lives.
    """

    def __init__(
        self,
        library: NativeLibrary,
        weight: Weight,
        bias_O: Tensor | None,
        output: Output,
        dtype: torch.dtype,
    ) -> None:
        num_outputs, num_inputs = weight.shape
        if output is Output.SILU_MUL:
            num_outputs //= 2
        self.dtype = dtype
        self._library = library
        self._output_dtype = torch.float32 if output is Output.FP32 else dtype
        self._packed = _pack(library, weight, num_outputs, output)
        self._bias = pack_bias(bias_O, output)
        self.matrix = Matrix(
            pointer(self._packed), pointer(self._bias), num_inputs, num_outputs, output
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See LinearOp."""
        num_tokens, num_inputs = x_TI.shape
        assert x_TI.dtype == self.dtype
        assert num_inputs == self.matrix.num_inputs
        y_TO = torch.empty(num_tokens, self.matrix.num_outputs, dtype=self._output_dtype)
        call = _LinearInt8Call(
            self.matrix,
            pointer(x_TI),
            pointer(y_TO),
            num_tokens,
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
        )
        self._library.call("linear_int8", call)
        return y_TO


def _pack(library: NativeLibrary, weight: Weight, num_outputs: int, output: Output) -> Tensor:
    """uint8, values and scales in the order of the kernel: ``kernels/tile_int8.h``."""
    assert weight.scales is not None
    call = _PackInt8Call(
        pointer(weight.values),
        pointer(weight.scales),
        None,
        weight.shape[1],
        num_outputs,
        output,
        torch.get_num_threads(),
    )
    library.call("pack_int8", call)
    packed = torch.empty(call.packed_bytes, dtype=torch.uint8)
    call.packed = pointer(packed)
    library.call("pack_int8", call)
    return packed
