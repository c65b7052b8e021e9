"""Linear layers by the C++ kernels: bf16 and fp32 on any CPU.

They stream the weights at memory bandwidth for few tokens, and a token's result does not depend on
the tokens beside it.

Shape legend: T tokens, I inputs, O outputs, F intermediate.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sortserve.model.backends.cpu.arena import Arena
from sortserve.model.backends.cpu.library import NativeLibrary, pointer
from sortserve.model.weight import PLAIN, Weight

__all__ = ["Matrix", "NativeLinear", "Output", "PackedLinear"]

_PANEL = 32
"""Outputs of a panel: kPanel of ``kernels/panel.h``."""


class Output(IntEnum):
    """What a product is made into: the enum Output of ``kernels/kernels.h``."""

    BF16 = 0
    FP32 = 1
    SILU_MUL = 2

    @staticmethod
    def of(dtype: torch.dtype) -> Output:
        """Sums rounded to ``dtype``."""
        return Output.BF16 if dtype == torch.bfloat16 else Output.FP32


def _pack_bias(bias_O: Tensor | None, output: Output) -> Tensor | None:
    """The bias of a packed weight in fp32, filled up to whole panels.

    Args:
        bias_O: in the order of the weight's outputs.
        output: for ``Output.SILU_MUL`` all gates, then all ups.
    """
    if bias_O is None:
        return None
    return _pad_outputs(
        (_interleave_halves(bias_O) if output is Output.SILU_MUL else bias_O).float()
    )


class Matrix(ctypes.Structure):
    """Matrix of ``kernels/kernels.h``."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_inputs", "num_outputs", "output", "format")),
    )


class _LinearCall(ctypes.Structure):
    """LinearCall of ``kernels/linear.cpp``."""

    _fields_ = (
        ("matrix", Matrix),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
    )


class _PackedRowsCall(ctypes.Structure):
    """PackedRowsCall of ``kernels/linear.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "outputs", "rows")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_words", "num_threads")),
    )


class PackedLinear(ABC):
    """One weight matrix, packed for a kernel: a LinearOp.

    Args:
        library: the kernels.
        arena: where the packed matrix goes.
        weight: with Output.SILU_MUL all gates, then all ups.
        bias_O: in the order of the weight's outputs.
        output: what the sums are made into.
        dtype: of the inputs, and of the outputs unless they are Output.FP32.

    Attributes:
        dtype: as given.
        matrix: the kernel's view of it; valid as long as this object lives.
    """

    format: ClassVar[int]
    """The enum Format of ``kernels/kernels.h``."""

    def __init__(
        self,
        library: NativeLibrary,
        arena: Arena,
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
        self._packed = self._pack(arena, weight, num_outputs, output)
        self._bias = _pack_bias(bias_O, output)
        self.matrix = Matrix(
            pointer(self._packed),
            pointer(self._bias),
            num_inputs,
            num_outputs,
            output,
            self.format,
        )

    @abstractmethod
    def _pack(self, arena: Arena, weight: Weight, num_outputs: int, output: Output) -> Tensor:
        """The matrix in the order of the kernel."""

    @abstractmethod
    def __call__(self, x_TI: Tensor) -> Tensor:
        """See LinearOp."""

    def _outputs(self, x_TI: Tensor) -> Tensor:
        """Room for what the kernel makes of these inputs."""
        num_tokens, num_inputs = x_TI.shape
        assert x_TI.dtype == self.dtype
        assert num_inputs == self.matrix.num_inputs
        return torch.empty(num_tokens, self.matrix.num_outputs, dtype=self._output_dtype)


class NativeLinear(PackedLinear):
    """A plain matrix in the dtype of the inputs: bf16 or fp32."""

    format = 0

    @staticmethod
    def can_pack(weight: Weight, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for products of ``weight`` with inputs of ``dtype``."""
        is_plain = weight.format is PLAIN and weight.values.dtype == dtype
        return is_plain and dtype in {torch.bfloat16, torch.float32}

    def _pack(self, arena: Arena, weight: Weight, num_outputs: int, output: Output) -> Tensor:
        is_gated = output is Output.SILU_MUL
        return _pack(arena, _interleave_halves(weight.values) if is_gated else weight.values)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See LinearOp."""
        y_TO = self._outputs(x_TI)
        call = _LinearCall(
            self.matrix, pointer(x_TI), pointer(y_TO), len(x_TI), torch.get_num_threads()
        )
        self._library.call("linear" if self.dtype == torch.bfloat16 else "linear_fp32", call)
        return y_TO

    def rows(self, outputs_N: Tensor) -> Tensor:
        """The weights of some outputs, [N, I]: rows of the matrix that was packed (not gated)."""
        assert self.matrix.output != Output.SILU_MUL
        assert outputs_N.dtype == torch.int64
        _panels, num_words, _outputs, inputs_a_word = self._packed.shape
        rows_NI = torch.empty(len(outputs_N), num_words * inputs_a_word, dtype=self.dtype)
        call = _PackedRowsCall(
            pointer(self._packed),
            pointer(outputs_N),
            pointer(rows_NI),
            len(outputs_N),
            num_words,
            torch.get_num_threads(),
        )
        self._library.call("packed_rows", call)
        return rows_NI[:, : self.matrix.num_inputs].contiguous()


def _pack(arena: Arena, weight_OI: Tensor) -> Tensor:
    """[O, I] to [panels, I / n, outputs of a panel, n], outputs and inputs filled up with zeros.

    n inputs are four bytes: 2 in bf16, 1 in fp32.
    """
    n = 4 // weight_OI.itemsize
    weight_OI = pad(weight_OI, (0, -weight_OI.shape[1] % n))
    words = _pad_outputs(weight_OI).view(torch.int32)  # torch moves these 3 times as fast
    words = words.view(-1, _PANEL, words.shape[1]).transpose(1, 2)
    panels = arena.empty(words.shape, words.dtype).copy_(words)
    return panels.view(weight_OI.dtype).view(*panels.shape, n)


def _pad_outputs(x_O: Tensor) -> Tensor:
    missing = -x_O.shape[0] % _PANEL
    if missing == 0:
        return x_O.contiguous()
    return torch.cat((x_O, x_O.new_zeros(missing, *x_O.shape[1:])))


def _interleave_halves(x_2F: Tensor) -> Tensor:
    """Half a panel of gates, then the same ups, and so on; F is filled up with zeros."""
    half = _PANEL // 2
    size = x_2F.shape[0] // 2
    rest = x_2F.shape[1:]
    padding = x_2F.new_zeros(-size % half, *rest)
    gates, ups = (torch.cat((x, padding)).view(-1, half, *rest) for x in x_2F.chunk(2))
    return torch.stack((gates, ups), dim=1).flatten(0, 2)
