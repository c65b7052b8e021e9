"""Linear layers in int8 by the C++ kernels; ``sortserve.model.quantization`` defines the format.

Shape legend: T tokens, I inputs, O outputs, F intermediate.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sortserve.model.backends.cpu.arena import Arena
from sortserve.model.backends.cpu.library import DTYPE_CODES, pointer
from sortserve.model.backends.cpu.linear import Matrix, Output, PackedLinear
from sortserve.model.quantization import INT8
from sortserve.model.weight import Weight

__all__ = ["NativeInt8Linear"]


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


class NativeInt8Linear(PackedLinear):
    """A matrix in int8; inputs are quantised by the kernel."""

    format = 1

    @staticmethod
    def can_pack(weight: Weight, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for products of ``weight`` with inputs of ``dtype``."""
        return weight.format is INT8 and dtype in {torch.float32, torch.bfloat16}

    def _pack(self, arena: Arena, weight: Weight, num_outputs: int, output: Output) -> Tensor:
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
        self._library.call("pack_int8", call)  # says how many bytes it takes
        packed = arena.empty((call.packed_bytes,), torch.uint8)
        call.packed = pointer(packed)
        self._library.call("pack_int8", call)
        return packed

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See LinearOp."""
        y_TO = self._outputs(x_TI)
        call = _LinearInt8Call(
            self.matrix,
            pointer(x_TI),
            pointer(y_TO),
            len(x_TI),
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
        )
        self._library.call("linear_int8", call)
        return y_TO
