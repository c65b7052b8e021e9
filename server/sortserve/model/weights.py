"""A decoder's weights, fused as the decoder wants them.

Shape legend: L layers, D hidden, V vocabulary, N query heads, K key/value heads, H head_dim,
F intermediate. The shape of a ``Weight`` is [out, in], as in ``torch.nn.Linear``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from sortserve.model.exit_module import ExitModule
from sortserve.model.weight import PLAIN, Weight

__all__ = [
    "ExitModuleWeights",
    "LayerWeights",
    "ModelWeights",
    "OwnLayerWeights",
    "quantization_of",
]


@dataclass(kw_only=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor
    """[D]"""
    qkv: Weight
    """[(N + 2K) * H, D]: query heads, then key heads, then value heads."""
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    """[H] (Qwen3)."""
    k_norm: Tensor | None = None
    o: Weight
    """[D, N * H]"""
    o_bias: Tensor | None = None
    attention_output_norm: Tensor | None = None
    """[D] (Ouro)."""
    post_attention_norm: Tensor
    """[D]"""
    gate_up: Weight
    """[2F, D]: gate, then up."""
    gate_up_bias: Tensor | None = None
    down: Weight
    """[D, F]"""
    down_bias: Tensor | None = None
    mlp_output_norm: Tensor | None = None
    """[D] (Ouro)."""


@dataclass(kw_only=True)
class OwnLayerWeights:
    """The own layer of an exit: as ``LayerWeights``, but that its queries are apart from its keys
    and values, as more tokens need the latter.
    """

    input_norm: Tensor
    """[D]"""
    q: Weight
    """[N * H, D]"""
    q_bias: Tensor | None = None
    kv: Weight
    """[2K * H, D]: key heads, then value heads."""
    kv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    """[H] (Qwen3)."""
    k_norm: Tensor | None = None
    o: Weight
    """[D, N * H]"""
    o_bias: Tensor | None = None
    post_attention_norm: Tensor
    """[D]"""
    gate_up: Weight
    """[2F, D]: gate, then up."""
    gate_up_bias: Tensor | None = None
    down: Weight
    """[D, F]"""
    down_bias: Tensor | None = None


@dataclass(kw_only=True)
class ExitModuleWeights:
    """What one exit has of its own."""

    kind: type[ExitModule]
    tensors: dict[str, Tensor]
    """By the names in ``kind.shapes``."""
    layer: OwnLayerWeights | None = None
    """Where ``kind.has_layer``: its layer, whose weights are not among ``tensors``."""
    head: Weight | None = None
    """[V, D], where ``kind.has_head``; nor is this."""


@dataclass(kw_only=True)
class ModelWeights:
    """The whole decoder, on one device in one dtype (``inv_freq`` stays fp32)."""

    embed: Tensor
    """[V, D]"""
    layers: list[LayerWeights]
    """Each once, however often it is run."""
    final_norm: Tensor
    """[D]"""
    lm_head: Weight
    """[V, D]; its values are the very tensor ``embed`` where the head is tied and plain."""
    inv_freq: Tensor
    """[H / 2] fp32, RoPE scaling applied."""
    rope_attention_scaling: float = 1.0
    """Factor on cos and sin (yarn)."""
    exit_modules: dict[int, ExitModuleWeights] = field(default_factory=dict)
    """By exit layer; an exit that is missing here has the shared final norm."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all of it; a head that is the embedding counts once."""
        parts: list[Tensor | Weight | None] = [self.final_norm, self.inv_freq, self.lm_head]
        if self.lm_head.values is not self.embed:
            parts.append(self.embed)
        for module in self.exit_modules.values():
            parts += [*module.tensors.values(), module.head]
        layers: list[LayerWeights | OwnLayerWeights] = [*self.layers]
        layers += [m.layer for m in self.exit_modules.values() if m.layer is not None]
        for layer in layers:
            parts += [getattr(layer, field.name) for field in fields(layer)]
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def own_heads(self) -> list[Weight]:
        """The heads of exits that have their own."""
        return [m.head for m in self.exit_modules.values() if m.head is not None]

    @property
    def formats(self) -> Mapping[str, int]:
        """How many of the matrices of layers and heads are in each format, by its name."""
        matrices = [self.lm_head, *self.own_heads]
        for layer in self.layers:
            matrices += [layer.qkv, layer.o, layer.gate_up, layer.down]
        return Counter(matrix.format.name for matrix in matrices)


def quantization_of(formats: Mapping[str, int]) -> str:
    """What weights in these formats are called where people and metrics are told: ``none`` if all
    are plain, else the names of the formats that are not.
    """
    return "+".join(sorted(set(formats) - {PLAIN.name})) or "none"
