"""What plain torch offers: everything, everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from sortserve.model.attention import RopeTables
from sortserve.model.backend import LayerStack, Ops, PackedLayer, Provider, Target
from sortserve.model.backends.reference.attention import ReferenceAttention
from sortserve.model.backends.reference.linear import ReferenceLinearBackend
from sortserve.model.backends.reference.ops import ReferenceOps
from sortserve.model.layers import StepwiseStack

__all__ = ["REFERENCE", "ReferenceAttentionBackend"]


class ReferenceAttentionBackend:
    """Any device, any dtype."""

    name = "reference"

    def __init__(self, target: Target) -> None:
        self.ops: Ops = ReferenceOps()
        self._config = target.config

    def attention(self, rope: RopeTables) -> ReferenceAttention:
        """See AttentionBackend."""
        return ReferenceAttention(self._config, rope)

    def stack(self, layers: Sequence[PackedLayer], rope: RopeTables) -> LayerStack:
        """See AttentionBackend."""
        return StepwiseStack(layers, self.attention(rope), self.ops, self._config.rms_norm_eps)


def _linear(target: Target, ops: Ops) -> ReferenceLinearBackend:
    del target
    return ReferenceLinearBackend(ops)


REFERENCE = Provider(
    attention={"auto": ReferenceAttentionBackend, "reference": ReferenceAttentionBackend},
    linear={"auto": _linear, "reference": _linear},
)
