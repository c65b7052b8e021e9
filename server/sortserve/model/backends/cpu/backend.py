"""What CPUs have to offer, and what is fastest on which of them.

Linear layers, fastest first on a CPU with AVX-512 BF16 and no AMX (``benchmarks/kernels.py``
measures): our C++ kernels ("native"), then oneDNN ("onednn"), then plain torch. With AMX, oneDNN is
faster for many tokens and ours for few: there both copies of the weights are kept if they are small
(HYBRID_MAX_BYTES), else oneDNN's alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sortserve.model.attention import RopeTables
from sortserve.model.backend import (
    LayerStack,
    LinearBackend,
    Ops,
    PackedLayer,
    Provider,
    Target,
)
from sortserve.model.backends.cpu.attention import NativeAttention
from sortserve.model.backends.cpu.hybrid import HybridLinearBackend
from sortserve.model.backends.cpu.library import DTYPE_CODES, NativeLibrary, load_native
from sortserve.model.backends.cpu.linear import NativeLinearBackend
from sortserve.model.backends.cpu.onednn import OneDnnLinearBackend
from sortserve.model.backends.cpu.ops import NativeOps
from sortserve.model.backends.cpu.stack import NativeStack, max_fused_tokens
from sortserve.model.backends.reference.linear import ReferenceLinearBackend
from sortserve.model.config import ModelConfig
from sortserve.model.layers import StepwiseStack

__all__ = ["CPU", "NativeAttentionBackend"]

HYBRID_MAX_BYTES = 4 << 30
HYBRID_MAX_NATIVE_TOKENS = 16


class NativeAttentionBackend:
    """The C++ kernels; layers in one call where their matrices are packed for them, too."""

    name = "native"

    def __init__(self, target: Target, library: NativeLibrary) -> None:
        self.ops: Ops = NativeOps(library)
        self._config = target.config
        self._dtype = target.dtype
        self._library = library

    def attention(self, rope: RopeTables) -> NativeAttention:
        """See AttentionBackend."""
        return NativeAttention(self._config, rope, self._library, self._dtype)

    def stack(self, layers: Sequence[PackedLayer], rope: RopeTables) -> LayerStack:
        """See AttentionBackend."""
        attention = self.attention(rope)
        stepwise = StepwiseStack(layers, attention, self.ops, self._config.rms_norm_eps)
        if max_fused_tokens(layers) == 0:
            return stepwise
        return NativeStack(layers, attention, stepwise)


def _native_attention(target: Target) -> NativeAttentionBackend | None:
    if target.device.type != "cpu" or target.dtype not in DTYPE_CODES:
        return None
    library = load_native()
    return None if library is None else NativeAttentionBackend(target, library)


def _native_linear(target: Target, ops: Ops) -> NativeLinearBackend | None:
    if target.device.type != "cpu" or target.dtype not in {torch.bfloat16, torch.float32}:
        return None
    library = load_native()
    if library is None or not (library.has_bf16_kernels or target.dtype == torch.float32):
        return None
    return NativeLinearBackend(library, ReferenceLinearBackend(ops))


def _onednn_linear(target: Target, ops: Ops) -> OneDnnLinearBackend | None:
    if target.device.type != "cpu" or target.dtype != torch.bfloat16:
        return None
    return OneDnnLinearBackend(ops) if OneDnnLinearBackend.is_available() else None


def _fastest_linear(target: Target, ops: Ops) -> LinearBackend | None:
    native, onednn = _native_linear(target, ops), _onednn_linear(target, ops)
    if native is None or onednn is None or not _has_amx():
        return native or onednn
    if _num_linear_elements(target.config) * target.dtype.itemsize > HYBRID_MAX_BYTES:
        return onednn
    return HybridLinearBackend(native, onednn, HYBRID_MAX_NATIVE_TOKENS)


def _has_amx() -> bool:
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except AttributeError:  # private: it may go
        return False


def _num_linear_elements(config: ModelConfig) -> int:
    """Elements of all linear weights, head included."""
    attention = (2 * config.q_size + 2 * config.kv_size) * config.hidden_size
    mlp = 3 * config.intermediate_size * config.hidden_size
    return config.num_layers * (attention + mlp) + config.vocab_size * config.hidden_size


CPU = Provider(
    attention={"auto": _native_attention, "native": _native_attention},
    linear={"auto": _fastest_linear, "onednn": _onednn_linear, "native": _native_linear},
)
