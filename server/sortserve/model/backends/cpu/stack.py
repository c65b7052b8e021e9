"""Many decoder layers in one C++ call: ``kernels/layers.cpp``.

One call a step instead of seven a layer: the GIL is taken once, and the threads stay together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sortserve.core.slabs import Slabs
from sortserve.model.attention import KVCache
from sortserve.model.backends.cpu.attention import NativeAttention, Step
from sortserve.model.backends.cpu.library import pointer
from sortserve.model.backends.cpu.linear import Matrix, PackedLinear
from sortserve.model.batch import Batch
from sortserve.model.layers import PackedLayer
from sortserve.model.weight import LinearOp

__all__ = ["NativeStack", "can_fuse"]

_TILE_ROWS = 16
"""kTileRows of ``kernels/rows.h``."""


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
        ("places", ctypes.POINTER(ctypes.c_int64)),
        ("steps", ctypes.POINTER(Step)),
        *((name, ctypes.c_void_p) for name in ("pages", "h", "delta", "x", "qkv", "heads", "mlp")),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden_size", "plane_size")),
    )


class _Places(NamedTuple):
    """Where a run of layers keeps its keys and values."""

    slabs: range
    array: ctypes.Array[ctypes.c_int64]
    """LayersCall.places, with the steps of ``slabs``."""


@lru_cache(maxsize=1024)
def _places(slabs: Slabs, layers: range) -> _Places:
    places = [slabs.place(layer) for layer in layers]
    (first, _), (last, _) = places[0], places[-1]
    numbers = [number for slab, plane in places for number in (slab - first, plane)]
    return _Places(range(first, last + 1), (ctypes.c_int64 * len(numbers))(*numbers))


def can_fuse(layers: Sequence[PackedLayer]) -> bool:
    """Whether all matrices of these layers are packed for the kernels, for bf16, and there is
    nothing in them that the kernels do not have.
    """
    if any(layer.attention_output_norm is not None for layer in layers):
        return False
    return all(
        isinstance(op, PackedLinear) and op.dtype == torch.bfloat16
        for layer in layers
        for op in (layer.qkv, layer.o, layer.gated, layer.down)
    )


class NativeStack:
    """A LayerStack in one call a segment.

    Args:
        layers: of the model; they ``can_fuse``.
        attention: of the model.
    """

    def __init__(self, layers: Sequence[PackedLayer], attention: NativeAttention) -> None:
        self._attention = attention
        self._layers = layers  # keeps the weights alive
        self._structures = (_Layer * len(layers))(*map(_structure, layers))

    def run(
        self,
        batch: Batch,
        layers: range,
        num_rows: int,
        h_TD: Tensor,
        delta_TD: Tensor,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Tensor]:
        """See LayerStack."""
        assert h_TD.dtype == kv_cache.pages.dtype == torch.bfloat16
        config, places = self._attention.config, _places(kv_cache.slabs, layers)
        num_tokens, hidden_size = h_TD.shape
        first = layers.start % len(self._layers)
        assert first + len(layers) <= len(self._layers)
        steps, _rows = self._attention.steps(batch, places.slabs, num_rows, kv_cache.block_size)
        num_rows_of_tiles = -(-num_tokens // _TILE_ROWS) * _TILE_ROWS
        workspaces = [
            h_TD.new_empty(num_rows_of_tiles, width)
            for width in (
                hidden_size,
                config.q_size + 2 * config.kv_size,
                config.q_size,
                config.intermediate_size,
            )
        ]
        call = _LayersCall(
            ctypes.addressof(self._structures) + first * ctypes.sizeof(_Layer),
            places.array,
            steps,
            pointer(kv_cache.pages),
            pointer(h_TD),
            pointer(delta_TD),
            *map(pointer, workspaces),
            len(layers),
            hidden_size,
            kv_cache.pages.stride(1),
        )
        self._attention.library.call("layers", call)
        return h_TD, delta_TD


def _matrix(op: LinearOp) -> Matrix:
    assert isinstance(op, PackedLinear)
    return op.matrix


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
