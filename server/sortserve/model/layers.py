"""Decoder layers, run one operation after another, on any backend and device.

The residual stream is ``h + delta``: an addition is left to the next norm, which reads both anyway.
Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sortserve.model.attention import AttentionBackend, HeadNorms, KVCache, SlabAttention
from sortserve.model.batch import Batch
from sortserve.model.linear import LinearBackend
from sortserve.model.ops import TorchOps
from sortserve.model.weights import LayerWeights

__all__ = ["DecoderLayer", "LayerStack", "LayerTools", "StepwiseStack"]


@dataclass(frozen=True)
class LayerTools:
    """What every layer computes with."""

    eps: float
    ops: TorchOps
    linear: LinearBackend


class DecoderLayer:
    """One decoder layer, its weights packed.

    Args:
        tools: what to compute with.
        weights: of the layer.
        release_weights: drop each matrix of ``weights`` once its packed copy exists.
    """

    def __init__(self, tools: LayerTools, weights: LayerWeights, release_weights: bool) -> None:
        self._eps = tools.eps
        self._ops = tools.ops
        self.input_norm = weights.input_norm
        self.post_attention_norm = weights.post_attention_norm
        self.head_norms: HeadNorms | None = None
        if weights.q_norm is not None and weights.k_norm is not None:
            self.head_norms = HeadNorms(weights.q_norm, weights.k_norm)
        self.qkv = tools.linear.linear(weights.qkv, weights.qkv_bias)
        self.o = tools.linear.linear(weights.o, weights.o_bias)
        self.gated = tools.linear.gated(weights.gate_up, weights.gate_up_bias)
        self.down = tools.linear.linear(weights.down, weights.down_bias)
        if release_weights:
            nothing = weights.qkv.new_empty(0)
            weights.qkv = weights.o = weights.gate_up = weights.down = nothing

    def __call__(
        self, h_TD: Tensor, delta_TD: Tensor, attention: SlabAttention, pages: Tensor
    ) -> Tensor:
        """Update ``h`` in place and return the new ``delta``."""
        x_TD = self._ops.add_rms_norm(h_TD, delta_TD, self.input_norm, self._eps)
        delta_TD = self.o(attention(self.qkv(x_TD), self.head_norms, pages))
        x_TD = self._ops.add_rms_norm(h_TD, delta_TD, self.post_attention_norm, self._eps)
        return self.down(self.gated(x_TD))


class LayerStack(Protocol):
    """Runs the layers of some slabs."""

    def run(
        self,
        batch: Batch,
        slabs: range,
        num_rows: int,
        h_TD: Tensor,
        delta_TD: Tensor,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Tensor]:
        """The new ``h`` and ``delta``; the old ones may be overwritten.

        Args:
            batch: the step.
            slabs: to run, in order.
            num_rows: the first rows of the batch, all alive in these slabs; T are their tokens.
            h_TD: the residual stream, without its last addition.
            delta_TD: that addition.
            kv_cache: new keys and values are written to it.
        """
        ...


class StepwiseStack:
    """One operation after another."""

    def __init__(self, layers: Sequence[DecoderLayer], attention: AttentionBackend) -> None:
        self._layers = layers
        self._attention = attention

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
        slab_size = kv_cache.slab_size
        for slab, attend in zip(
            slabs, self._attention.prepare(batch, slabs, num_rows), strict=True
        ):
            for index in range(slab * slab_size, (slab + 1) * slab_size):
                delta_TD = self._layers[index](h_TD, delta_TD, attend, kv_cache.layer(index))
        return h_TD, delta_TD
