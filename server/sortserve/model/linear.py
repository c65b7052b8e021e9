"""Linear layers, their weights packed for the device at load.

Backends, fastest first on a CPU with AVX-512 BF16 and no AMX (``benchmarks/kernels.py`` measures):

* native: our C++ kernels; bf16 with AVX-512 BF16, and fp32 on any CPU. They stream the weights at
  memory bandwidth for few tokens, and a token's result does not depend on the tokens beside it.
* onednn: torch's bundled oneDNN with weights in its own packed layout; bf16.
* reference: ``torch.nn.functional.linear``; any device, any dtype.

``auto`` takes the first that works. With AMX, oneDNN is faster for many tokens and ours for few:
there both copies of the weights are kept if they are small (HYBRID_MAX_BYTES), else oneDNN's alone.

Shape legend: T tokens, I inputs, O outputs, F intermediate.
"""

from __future__ import annotations

import ctypes
import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sortserve.core.errors import ConfigError
from sortserve.model.backends.cpu.library import NativeLibrary, load_native, pointer
from sortserve.model.ops import TorchOps

__all__ = [
    "LINEAR_BACKENDS",
    "EitherLinear",
    "HybridBackend",
    "LinearBackend",
    "LinearOp",
    "Matrix",
    "NativeBackend",
    "NativeLinear",
    "OneDnnBackend",
    "TorchBackend",
    "choose_linear_backend",
]

LINEAR_BACKENDS = ("auto", "reference", "onednn", "native")

HYBRID_MAX_BYTES = 4 << 30
HYBRID_MAX_NATIVE_TOKENS = 16
_BF16_PANEL = 32
"""Outputs of a panel: kPanel of ``kernels/linear.cpp``."""


class LinearOp(Protocol):
    """A linear map with its weights inside: [T, I] to [T, O]."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Multiply."""
        ...


class LinearBackend(Protocol):
    """Packs weights and multiplies by them."""

    name: str
    max_fused_tokens: float
    """Up to this many tokens, layers may run in the fused C++ call if it has all their matrices."""

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearOp:
        """``x W^T + b`` in the dtype of x."""
        ...

    def gated(self, weight_2FI: Tensor, bias_2F: Tensor | None = None) -> LinearOp:
        """``silu(gate) * up``: the weights are all gates, then all ups; [T, I] to [T, F]."""
        ...

    def head(self, weight_OI: Tensor) -> LinearOp:
        """``x W^T`` in fp32."""
        ...


class TorchBackend:
    """Plain torch: the weights as they are."""

    name = "reference"
    max_fused_tokens = 0.0

    def __init__(self, ops: TorchOps) -> None:
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


class OneDnnBackend(TorchBackend):
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


class NativeBackend:
    """The C++ kernels for bf16 and fp32; weights they cannot take go to ``fallback``."""

    name = "native"
    max_fused_tokens = math.inf

    def __init__(self, library: NativeLibrary, fallback: LinearBackend) -> None:
        self._library = library
        self._fallback = fallback

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        if not self._can_pack(weight_OI):
            return self._fallback.linear(weight_OI, bias_O)
        output = _OUTPUT_BF16 if weight_OI.dtype == torch.bfloat16 else _OUTPUT_FP32
        return NativeLinear(self._library, output, weight_OI.shape[0], weight_OI, bias_O)

    def gated(self, weight_2FI: Tensor, bias_2F: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        if not self._can_pack(weight_2FI):
            return self._fallback.gated(weight_2FI, bias_2F)
        panel = _panel(self._library, weight_2FI.dtype)
        bias = None if bias_2F is None else _interleave_halves(bias_2F, panel)
        return NativeLinear(
            self._library,
            _OUTPUT_SILU_MUL,
            weight_2FI.shape[0] // 2,
            _interleave_halves(weight_2FI, panel),
            bias,
        )

    def head(self, weight_OI: Tensor) -> LinearOp:
        """See LinearBackend."""
        if not self._can_pack(weight_OI):
            return self._fallback.head(weight_OI)
        return NativeLinear(self._library, _OUTPUT_FP32, weight_OI.shape[0], weight_OI, None)

    def _can_pack(self, weight_OI: Tensor) -> bool:
        if weight_OI.dtype == torch.float32:
            return True
        return self._library.has_bf16_kernels and weight_OI.shape[1] % 2 == 0


class HybridBackend:
    """One backend for few tokens, another for many; both keep their weights."""

    name = "native+onednn"

    def __init__(self, few: LinearBackend, many: LinearBackend, max_few_tokens: int) -> None:
        self._few = few
        self._many = many
        self._max_few_tokens = max_few_tokens
        self.max_fused_tokens = float(max_few_tokens)

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        return self._either(
            self._few.linear(weight_OI, bias_O), self._many.linear(weight_OI, bias_O)
        )

    def gated(self, weight_2FI: Tensor, bias_2F: Tensor | None = None) -> LinearOp:
        """See LinearBackend."""
        return self._either(
            self._few.gated(weight_2FI, bias_2F), self._many.gated(weight_2FI, bias_2F)
        )

    def head(self, weight_OI: Tensor) -> LinearOp:
        """See LinearBackend."""
        return self._either(self._few.head(weight_OI), self._many.head(weight_OI))

    def _either(self, few: LinearOp, many: LinearOp) -> LinearOp:
        return EitherLinear(few, many, self._max_few_tokens)


class EitherLinear:
    """``few`` for up to ``max_few_tokens`` tokens, else ``many``."""

    def __init__(self, few: LinearOp, many: LinearOp, max_few_tokens: int) -> None:
        self.few = few
        self._many = many
        self._max_few_tokens = max_few_tokens

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See LinearOp."""
        return (self.few if x_TI.shape[0] <= self._max_few_tokens else self._many)(x_TI)


def choose_linear_backend(
    name: str, *, dtype: torch.dtype, device: torch.device, num_weight_bytes: int, ops: TorchOps
) -> LinearBackend:
    """The backend of that name, or for "auto" the fastest for these weights on this machine.

    Args:
        name: one of LINEAR_BACKENDS.
        dtype: of the weights.
        device: of the weights.
        num_weight_bytes: of all the linear layers together.
        ops: computes what a backend has no fused version of.

    Raises:
        ConfigError: the named backend cannot work here.
    """
    reference = TorchBackend(ops)
    onednn = native = None
    if device.type == "cpu":
        if name in {"auto", "onednn"} and dtype == torch.bfloat16 and OneDnnBackend.is_available():
            onednn = OneDnnBackend(ops)
        if name in {"auto", "native"} and dtype in {torch.bfloat16, torch.float32}:
            library = load_native()
            if library is not None and (library.has_bf16_kernels or dtype == torch.float32):
                native = NativeBackend(library, reference)
    choices: dict[str, LinearBackend | None] = {
        "auto": _fastest(native, onednn, num_weight_bytes) or reference,
        "reference": reference,
        "onednn": onednn,
        "native": native,
    }
    backend = choices.get(name)
    if backend is None:
        raise ConfigError(
            f"linear_backend {name!r} cannot be used for {dtype} on {device.type} on this machine; "
            f"use 'auto' (backends: {', '.join(LINEAR_BACKENDS)})",
            param="linear_backend",
        )
    return backend


def _fastest(
    native: NativeBackend | None, onednn: OneDnnBackend | None, num_weight_bytes: int
) -> LinearBackend | None:
    if native is None or onednn is None or not _has_amx():
        return native or onednn
    if num_weight_bytes > HYBRID_MAX_BYTES:
        return onednn
    return HybridBackend(native, onednn, HYBRID_MAX_NATIVE_TOKENS)


def _has_amx() -> bool:
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except AttributeError:  # private: it may go
        return False


_OUTPUT_BF16, _OUTPUT_FP32, _OUTPUT_SILU_MUL = 0, 1, 2
"""The enum Output of ``kernels/linear.cpp``."""


class Matrix(ctypes.Structure):
    """Matrix of ``kernels/kernels.h``."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_inputs", "num_outputs", "output")),
    )


class _LinearCall(ctypes.Structure):
    """LinearCall of ``kernels/linear.cpp``, LinearFp32Call of ``kernels/linear_fp32.cpp``."""

    _fields_ = (
        ("matrix", Matrix),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
    )


class NativeLinear:
    """One weight matrix, packed for the C++ kernel of its dtype.

    Attributes:
        dtype: of weights and inputs.
        matrix: the kernel's view of it; valid as long as this object lives.
    """

    def __init__(
        self,
        library: NativeLibrary,
        output: int,
        num_outputs: int,
        weight_OI: Tensor,
        bias_O: Tensor | None,
    ) -> None:
        self.dtype = weight_OI.dtype
        self._library = library
        self._kernel = "linear" if self.dtype == torch.bfloat16 else "linear_fp32"
        self._output_dtype = torch.float32 if output == _OUTPUT_FP32 else self.dtype
        panel = _panel(library, self.dtype)
        self._packed = _pack(weight_OI, panel)
        self._bias = None if bias_O is None else _pad_outputs(bias_O.float(), panel)
        self.matrix = Matrix(
            pointer(self._packed), pointer(self._bias), weight_OI.shape[1], num_outputs, output
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See LinearOp."""
        num_tokens, num_inputs = x_TI.shape
        assert x_TI.dtype == self.dtype
        assert num_inputs == self.matrix.num_inputs
        y_TO = torch.empty(num_tokens, self.matrix.num_outputs, dtype=self._output_dtype)
        call = _LinearCall(
            self.matrix, pointer(x_TI), pointer(y_TO), num_tokens, torch.get_num_threads()
        )
        self._library.call(self._kernel, call)
        return y_TO


def _panel(library: NativeLibrary, dtype: torch.dtype) -> int:
    """Outputs of a panel of weights."""
    return _BF16_PANEL if dtype == torch.bfloat16 else library.fp32_panel


def _pack(weight_OI: Tensor, panel: int) -> Tensor:
    """[O, I] to [panels, I / n, outputs of a panel, n], the last panel filled up with zeros.

    n inputs are four bytes: 2 in bf16, 1 in fp32.
    """
    n = 4 // weight_OI.itemsize
    panels = _pad_outputs(weight_OI, panel).view(-1, panel, weight_OI.shape[1] // n, n)
    return panels.transpose(1, 2).contiguous()


def _pad_outputs(x_O: Tensor, panel: int) -> Tensor:
    missing = -x_O.shape[0] % panel
    if missing == 0:
        return x_O.contiguous()
    return torch.cat((x_O, x_O.new_zeros(missing, *x_O.shape[1:])))


def _interleave_halves(x_2F: Tensor, panel: int) -> Tensor:
    """Half a panel of gates, then the same ups, and so on; F is filled up with zeros."""
    half = panel // 2
    size = x_2F.shape[0] // 2
    rest = x_2F.shape[1:]
    padding = x_2F.new_zeros(-size % half, *rest)
    gates, ups = (torch.cat((x, padding)).view(-1, half, *rest) for x in x_2F.chunk(2))
    return torch.stack((gates, ups), dim=1).flatten(0, 2)
