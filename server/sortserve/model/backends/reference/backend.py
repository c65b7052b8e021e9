"""Plain torch: everything, everywhere; what the other backends are tested against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sortserve.core.slabs import Slabs
from sortserve.model.attention import Attention, KVCache, RopeTables
from sortserve.model.backend import Embedding, LayerStack, Ops, RowSampling, Target
from sortserve.model.backends.reference.attention import ReferenceAttention
from sortserve.model.backends.reference.ops import ReferenceOps
from sortserve.model.layers import StepwiseStack
from sortserve.model.weight import LinearOp, Weight
from sortserve.model.weights import LayerWeights

__all__ = ["ReferenceBackend"]


class ReferenceBackend:
    """Any device, any dtype, any format of weights. See ``Backend`` for all methods."""

    name = "reference"
    detail = ""
    sampling: RowSampling | None = None
    supports_graphs = False
    """It could be recorded, but would then gather as many pages for every row as a row may have."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.ops: Ops = ReferenceOps()

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> LinearOp:
        """The format's own definition."""
        return weight.format.linear(weight, bias_O)

    def gated(self, weight: Weight, bias_2F: Tensor | None = None) -> LinearOp:
        """The product, then the gate."""
        linear = weight.format.linear(weight, bias_2F)
        return lambda x_TI: self.ops.silu_and_mul(linear(x_TI))

    def summed(self, linear: LinearOp) -> LinearOp:
        """The product itself: there is one rank."""
        return linear

    def head(self, weight: Weight) -> LinearOp:
        """The product, then fp32."""
        linear = weight.format.linear(weight, None)
        return lambda x_TI: linear(x_TI).float()

    def tied_embedding(self, head: LinearOp) -> Embedding | None:
        """None: the head reads the matrix itself."""
        return None

    def attention(self, rope: RopeTables) -> Attention:
        """Gathers pages, then ``scaled_dot_product_attention``."""
        return ReferenceAttention(self.target.config, rope)

    def stack(
        self, layers: Sequence[LayerWeights], rope: RopeTables, *, release_weights: bool
    ) -> LayerStack:
        """One operation after another."""
        return StepwiseStack.build(
            self,
            layers,
            self.attention(rope),
            self.target.config.rms_norm_eps,
            release_weights=release_weights,
        )

    def allocate_kv_cache(self, slabs: Slabs, num_pages: int, block_size: int) -> KVCache:
        """Zeroed pages in the dtype of the target."""
        target = self.target
        return KVCache.allocate(
            target.config, slabs, num_pages, block_size, target.dtype, target.device
        )
