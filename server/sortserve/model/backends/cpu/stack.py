"""Many decoder layers in one C++ call: ``kernels/layers.cpp``.

One call a step instead of seven a layer: the GIL is taken once, and the threads stay together.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sortserve.model.attention import KVCache
from sortserve.model.backend import LayerStack, LinearOp, PackedLayer
from sortserve.model.backends.cpu.attention import NativeAttention, Step
from sortserve.model.backends.cpu.hybrid import EitherLinear
from sortserve.model.backends.cpu.library import pointer
from sortserve.model.backends.cpu.linear import Matrix, NativeLinear
from sortserve.model.batch import Batch

__all__ = ["NativeStack", "max_fused_tokens"]


class _Layer(ctypes.Structure):
    """Layer of ``kernels/layers.cpp``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("input_norm", "post_attention_norm", "q_norm", "k_norm")
        ),
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
    )


class _LayersCall(ctypes.Structure):
    """LayersCall of ``kernels/layers.cpp``."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("steps", ctypes.POINTER(Step)),
        *((name, ctypes.c_void_p) for name in ("pages", "h", "delta", "x", "qkv", "heads", "mlp")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_slabs", "slab_size", "hidden_size", "plane_size")
        ),
    )


def max_fused_tokens(layers: Sequence[PackedLayer]) -> float:
    """Steps of up to this many tokens multiply by all these layers in the C++ kernel for bf16."""
    ops = (op for layer in layers for op in (layer.qkv, layer.o, layer.gated, layer.down))
    return min(map(_max_native_tokens, ops))


def _max_native_tokens(op: LinearOp) -> float:
    native = _native(op)
    if native is None or native.dtype != torch.bfloat16:
        return 0
    return op.max_few_tokens if isinstance(op, EitherLinear) else math.inf


class NativeStack:
    """A LayerStack in few calls, as long as the C++ kernel has the matrices.

    Args:
        layers: of the model; ``max_fused_tokens`` of them is above 0.
        attention: of the model.
        stepwise: runs the steps that have more tokens than that.
    """

    def __init__(
        self, layers: Sequence[PackedLayer], attention: NativeAttention, stepwise: LayerStack
    ) -> None:
        self._attention = attention
        self._stepwise = stepwise
        self._max_tokens = max_fused_tokens(layers)
        self._layers = layers  # keeps the weights alive
        self._structures = (_Layer * len(layers))(*map(_structure, layers))

    def run(
        self,
        batch: Batch,
        slabs: range,
        num_rows: int,
        h_TD: Tensor,
        delta_TD: Tensor,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Tensor]:
        """See LayerStack."""
        if len(h_TD) > self._max_tokens:
            return self._stepwise.run(batch, slabs, num_rows, h_TD, delta_TD, kv_cache)
        assert h_TD.dtype == kv_cache.pages.dtype == torch.bfloat16
        config, slab_size = self._attention.config, kv_cache.slab_size
        num_tokens, hidden_size = h_TD.shape
        steps, _rows = self._attention.steps(batch, slabs, num_rows, kv_cache.block_size)
        workspaces = [
            h_TD.new_empty(num_tokens, width)
            for width in (
                hidden_size,
                config.q_size + 2 * config.kv_size,
                config.q_size,
                config.intermediate_size,
            )
        ]
        first_layer = slabs.start * slab_size
        call = _LayersCall(
            ctypes.addressof(self._structures) + first_layer * ctypes.sizeof(_Layer),
            steps,
            pointer(kv_cache.pages),
            pointer(h_TD),
            pointer(delta_TD),
            *map(pointer, workspaces),
            len(slabs),
            slab_size,
            hidden_size,
            kv_cache.pages.stride(1),
        )
        self._attention.library.call("layers", call)
        return h_TD, delta_TD


def _native(op: LinearOp) -> NativeLinear | None:
    if isinstance(op, EitherLinear):
        op = op.few
    return op if isinstance(op, NativeLinear) else None


def _matrix(op: LinearOp) -> Matrix:
    native = _native(op)
    assert native is not None
    return native.matrix


def _structure(layer: PackedLayer) -> _Layer:
    norms = layer.head_norms
    return _Layer(
        pointer(layer.input_norm),
        pointer(layer.post_attention_norm),
        pointer(norms.query if norms else None),
        pointer(norms.key if norms else None),
        _matrix(layer.qkv),
        _matrix(layer.o),
        _matrix(layer.gated),
        _matrix(layer.down),
    )
