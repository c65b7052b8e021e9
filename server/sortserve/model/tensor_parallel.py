"""The backend of one of several ranks: another backend, and what the ranks do together.

``local_shape`` says how a decoder is divided. Here are the two operations that need all ranks, and
the places where they happen: the sum after the output projection and after down, and the gathering
of the logits.

Shape legend: T tokens, R rows that sample, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from sortserve.core.slabs import Slabs
from sortserve.model.attention import Attention, KVCache, RopeTables
from sortserve.model.backend import Backend, Embedding, LayerStack
from sortserve.model.config import ModelConfig
from sortserve.model.layers import PackedLayer, StepwiseStack, pack_layer
from sortserve.model.local_shape import LocalShape
from sortserve.model.weight import LinearOp, Weight
from sortserve.model.weights import LayerWeights

__all__ = ["Collectives", "ParallelBackend"]


class Collectives(Protocol):
    """What all ranks of a group do together, each in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, the same bits on each; ``x`` may be overwritten."""
        ...

    def gather(self, x: Tensor) -> Sequence[Tensor] | None:
        """Every rank's ``x``, all of one shape, in the order of the ranks; None but on rank 0."""
        ...


class ParallelBackend:
    """One rank's backend. See ``Backend`` for all methods.

    Layers run one operation after another, whatever faster way the rank's own backend has: the sums
    stand between them.

    Args:
        backend: computes this rank's share: it was made for ``shape.config(config)``.
        config: the whole model.
        shape: this rank's share of it.
        collectives: of its group.
    """

    supports_graphs = False

    def __init__(
        self, backend: Backend, config: ModelConfig, shape: LocalShape, collectives: Collectives
    ) -> None:
        self.name = backend.name
        self.detail = backend.detail
        self.ops = backend.ops
        self.sampling = backend.sampling
        self._backend = backend
        self._config = config
        self._shape = shape
        self._collectives = collectives

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> LinearOp:
        """A product that each rank computes by itself."""
        return self._backend.linear(weight, bias_O)

    def gated(self, weight: Weight, bias_2F: Tensor | None = None) -> LinearOp:
        """Likewise."""
        return self._backend.gated(weight, bias_2F)

    def summed(self, linear: LinearOp) -> LinearOp:
        """The sum of all ranks' products."""
        return lambda x_TI: self._collectives.sum(linear(x_TI))

    def head(self, weight: Weight) -> LinearOp:
        """``weight`` is the rank's part of the vocabulary; the logits are whole on rank 0 only."""
        local = self._backend.head(weight)
        sizes = self._vocabulary_sizes()

        def logits(x_TI: Tensor) -> Tensor:
            logits_RO = local(x_TI)  # T are the rows that sample
            parts = self._collectives.gather(pad(logits_RO, (0, max(sizes) - logits_RO.shape[1])))
            if parts is None:
                return logits_RO
            return torch.cat([p[:, :n] for p, n in zip(parts, sizes, strict=True)], dim=1)

        return logits

    def tied_embedding(self, head: LinearOp) -> Embedding | None:
        """None: a rank's head is a part of the matrix."""
        return None

    def _vocabulary_sizes(self) -> list[int]:
        num_ranks = self._shape.num_ranks
        shares = [
            LocalShape.of(self._config, rank, num_ranks).vocabulary for rank in range(num_ranks)
        ]
        return [share.stop - share.start for share in shares]

    def attention(self, rope: RopeTables) -> Attention:
        """Over the rank's heads."""
        return self._backend.attention(rope)

    def stack(
        self, layers: Sequence[LayerWeights], rope: RopeTables, *, release_weights: bool
    ) -> LayerStack:
        """One operation after another, and the sums between them."""
        packed = [
            self._summing(pack_layer(self._backend, layer, release_weights=release_weights))
            for layer in layers
        ]
        eps = self._config.rms_norm_eps
        return StepwiseStack(packed, self.attention(rope), self.ops, eps)

    def _summing(self, layer: PackedLayer) -> PackedLayer:
        return replace(layer, o=self.summed(layer.o), down=self.summed(layer.down))

    def allocate_kv_cache(self, slabs: Slabs, num_pages: int, block_size: int) -> KVCache:
        """Pages of the rank's key/value heads."""
        return self._backend.allocate_kv_cache(slabs, num_pages, block_size)
