"""The interface of a backend: what a decoder computes with.

A backend has two parts, each with a flag of its own: ``AttentionBackend`` runs the layers of a
model around attention (``--attention-backend``), ``LinearBackend`` packs the weights of linear
layers and multiplies by them (``--linear-backend``). ``sortserve.model.backends`` has those there
are and chooses among them, once; a decoder is handed the ``Backend`` and asks for no names.

Shape legend: T tokens, D hidden, I inputs, O outputs, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sortserve.model.attention import Attention, HeadNorms, KVCache, RopeTables
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = [
    "AttentionBackend",
    "Backend",
    "LayerStack",
    "LinearBackend",
    "LinearOp",
    "Ops",
    "PackedLayer",
    "Provider",
    "Target",
]


class Ops(Protocol):
    """The small operations of a decoder layer.

    Norms compute in fp32 and round once, to the dtype of the input.
    """

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``x / rms(x) * weight`` over the last dimension."""
        ...

    def add_rms_norm(self, h_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``h += delta`` in place, then the norm of h."""
        ...

    def silu_and_mul(self, gate_up_TF: Tensor) -> Tensor:
        """``silu(gate) * up`` of the two halves: [T, 2F] to [T, F]."""
        ...


class LinearOp(Protocol):
    """A linear map with its weights inside: [T, I] to [T, O]."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Multiply."""
        ...


class LinearBackend(Protocol):
    """Packs weights and multiplies by them."""

    name: str

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearOp:
        """``x W^T + b`` in the dtype of x."""
        ...

    def gated(self, weight_2FI: Tensor, bias_2F: Tensor | None = None) -> LinearOp:
        """``silu(gate) * up``: the weights are all gates, then all ups; [T, I] to [T, F]."""
        ...

    def head(self, weight_OI: Tensor) -> LinearOp:
        """``x W^T`` in fp32."""
        ...


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One decoder layer, its matrices packed by a ``LinearBackend``."""

    input_norm: Tensor
    """[D]"""
    qkv: LinearOp
    head_norms: HeadNorms | None
    o: LinearOp
    post_attention_norm: Tensor
    """[D]"""
    gated: LinearOp
    down: LinearOp


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


class AttentionBackend(Protocol):
    """Attention, norms and gates, and the layers around them."""

    name: str
    ops: Ops

    def attention(self, rope: RopeTables) -> Attention:
        """Attention over pages, for the positions that ``rope`` has."""
        ...

    def stack(self, layers: Sequence[PackedLayer], rope: RopeTables) -> LayerStack:
        """All layers of a model; ``StepwiseStack``, or something that needs fewer calls."""
        ...


@dataclass(frozen=True)
class Backend:
    """What a decoder computes with: both parts, as they were chosen."""

    attention: AttentionBackend
    linear: LinearBackend

    @property
    def ops(self) -> Ops:
        """Norms and gates."""
        return self.attention.ops


@dataclass(frozen=True)
class Target:
    """What is to be computed and where: the choice of a backend depends on nothing else."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Provider:
    """What one folder of ``backends`` offers, by the names that the flags take.

    Each function answers None where its part cannot work. Under the name "auto" it answers with
    the fastest that the folder has for the target, if that should be taken unasked.
    """

    attention: Mapping[str, Callable[[Target], AttentionBackend | None]] = field(
        default_factory=dict
    )
    linear: Mapping[str, Callable[[Target, Ops], LinearBackend | None]] = field(
        default_factory=dict
    )
    """The ``Ops`` are for what a part has no fused version of."""
