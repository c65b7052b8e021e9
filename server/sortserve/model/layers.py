"""Decoder layers, run one operation after another, on any backend and device.

The residual stream is ``h + delta``: an addition is left to the next norm, which reads both anyway.
Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sortserve.model.attention import Attention, HeadNorms, KVCache, SlabAttention
from sortserve.model.backend import Backend, Ops
from sortserve.model.batch import Batch
from sortserve.model.weight import LinearOp, Weight
from sortserve.model.weights import LayerWeights

__all__ = ["PackedLayer", "StepwiseStack", "pack_layer"]


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One decoder layer, its matrices packed by a backend."""

    input_norm: Tensor
    """[D]"""
    qkv: LinearOp
    head_norms: HeadNorms | None
    o: LinearOp
    attention_output_norm: Tensor | None
    """[D]"""
    post_attention_norm: Tensor
    """[D]"""
    gated: LinearOp
    down: LinearOp
    mlp_output_norm: Tensor | None
    """[D]"""


def pack_layer(backend: Backend, weights: LayerWeights, *, release_weights: bool) -> PackedLayer:
    """A layer that is ready to run.

    Args:
        backend: packs the matrices.
        weights: of the layer.
        release_weights: drop each matrix of ``weights`` once its packed copy exists.
    """
    head_norms = None
    if weights.q_norm is not None and weights.k_norm is not None:
        head_norms = HeadNorms(weights.q_norm, weights.k_norm)
    layer = PackedLayer(
        input_norm=weights.input_norm,
        qkv=backend.linear(weights.qkv, weights.qkv_bias),
        head_norms=head_norms,
        o=backend.linear(weights.o, weights.o_bias),
        attention_output_norm=weights.attention_output_norm,
        post_attention_norm=weights.post_attention_norm,
        gated=backend.gated(weights.gate_up, weights.gate_up_bias),
        down=backend.linear(weights.down, weights.down_bias),
        mlp_output_norm=weights.mlp_output_norm,
    )
    if release_weights:
        weights.qkv = weights.o = weights.gate_up = weights.down = Weight.nothing()
    return layer


class StepwiseStack:
    """A LayerStack for any backend: one operation after another."""

    def __init__(
        self, layers: Sequence[PackedLayer], attention: Attention, ops: Ops, eps: float
    ) -> None:
        self._layers = layers
        self._attention = attention
        self._ops = ops
        self._eps = eps

    @staticmethod
    def build(
        backend: Backend,
        layers: Sequence[LayerWeights],
        attention: Attention,
        eps: float,
        *,
        release_weights: bool,
    ) -> StepwiseStack:
        """A stack of layers that ``backend`` packs; arguments as for ``Backend.stack``."""
        packed = [pack_layer(backend, layer, release_weights=release_weights) for layer in layers]
        return StepwiseStack(packed, attention, backend.ops, eps)

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
        places = [kv_cache.slabs.place(layer) for layer in layers]
        slabs = range(places[0][0], places[-1][0] + 1)
        attentions = self._attention.prepare(batch, slabs, num_rows)
        for layer, (slab, plane) in zip(layers, places, strict=True):
            attend, pages = attentions[slab - slabs.start], kv_cache.pages[plane]
            packed = self._layers[layer % len(self._layers)]
            delta_TD = self._run_layer(packed, h_TD, delta_TD, attend, pages)
        return h_TD, delta_TD

    def _run_layer(
        self,
        layer: PackedLayer,
        h_TD: Tensor,
        delta_TD: Tensor,
        attend: SlabAttention,
        pages: Tensor,
    ) -> Tensor:
        """Update ``h`` in place and return the new ``delta``."""
        x_TD = self._ops.add_rms_norm(h_TD, delta_TD, layer.input_norm, self._eps)
        delta_TD = layer.o(attend(layer.qkv(x_TD), layer.head_norms, pages))
        delta_TD = self._normed(delta_TD, layer.attention_output_norm)
        x_TD = self._ops.add_rms_norm(h_TD, delta_TD, layer.post_attention_norm, self._eps)
        return self._normed(layer.down(layer.gated(x_TD)), layer.mlp_output_norm)

    def _normed(self, delta_TD: Tensor, weight_D: Tensor | None) -> Tensor:
        if weight_D is None:
            return delta_TD
        return self._ops.rms_norm(delta_TD, weight_D, self._eps)
