"""The small operations of a decoder layer in C++.

Shape legend: T tokens, D hidden, F intermediate.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sortserve.model.backends.cpu.library import DTYPE_CODES, NativeLibrary, pointer
from sortserve.model.backends.reference.ops import ReferenceOps

__all__ = ["NativeOps"]


class NativeOps(ReferenceOps):
    """The C++ versions for CPU tensors; everything else goes to plain torch."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See Ops."""
        if not _is_native(x_TD, weight_D):
            return super().rms_norm(x_TD, weight_D, eps)
        return self._add_rms_norm(x_TD, None, weight_D, eps)

    def add_rms_norm(self, h_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See Ops."""
        if not _is_native(h_TD, delta_TD, weight_D):
            return super().add_rms_norm(h_TD, delta_TD, weight_D, eps)
        return self._add_rms_norm(h_TD, delta_TD, weight_D, eps)

    def silu_and_mul(self, gate_up_TF: Tensor) -> Tensor:
        """See Ops."""
        if not _is_native(gate_up_TF):
            return super().silu_and_mul(gate_up_TF)
        num_rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
        y_TF = gate_up_TF.new_empty(num_rows, width)
        self._call("silu_and_mul", gate_up_TF, None, None, y_TF)
        return y_TF

    def _add_rms_norm(
        self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> Tensor:
        y_TD = torch.empty_like(x_TD)
        self._call("add_rms_norm", x_TD, delta_TD, weight_D, y_TD, eps)
        return y_TD

    def _call(
        self,
        name: str,
        x: Tensor,
        delta: Tensor | None,
        weight: Tensor | None,
        y: Tensor,
        eps: float = 0.0,
    ) -> None:
        call = _RowsCall(
            pointer(x),
            pointer(delta),
            pointer(weight),
            pointer(y),
            y.shape[0],
            y.shape[1],
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
            eps,
        )
        self._library.call(name, call)


class _RowsCall(ctypes.Structure):
    """RowsCall of ``kernels/ops.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "delta", "weight", "y")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "dtype", "num_threads")),
        ("eps", ctypes.c_double),
    )


def _is_native(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    return dtype in DTYPE_CODES and all(
        t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous() for t in tensors
    )
