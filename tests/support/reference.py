"""The forward pass again, in the plainest torch: no cache, no batch, no fusion, fp32.

Quantised weights count as the matrices they stand for.

Written from the definitions, apart from both the product's decoder and transformers, so that a
disagreement between those two can be settled.

Shape legend: T tokens, D hidden, V vocabulary, N query heads, K key/value heads, H head_dim,
F intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from sortserve.model.config import ModelConfig
from sortserve.model.weight import Weight
from sortserve.model.weights import LayerWeights, ModelWeights, OwnLayerWeights

__all__ = ["apply_exit_module", "reference_forward", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def apply_exit_module(h_TD: Tensor, tensors: Mapping[str, Tensor], eps: float) -> Tensor:
    """One exit module by its tensors in ``exit_modules.safetensors``; [T, D] to [T, D]."""
    if "affine.weight" in tensors:
        h_TD = h_TD + h_TD @ tensors["affine.weight"].T
    if "mlp_norm.weight" in tensors:
        x_TD = rms_norm(h_TD, tensors["mlp_norm.weight"], eps)
        gate_TF = silu(x_TD @ tensors["gate_proj.weight"].T)
        up_TF = x_TD @ tensors["up_proj.weight"].T
        h_TD = h_TD + (gate_TF * up_TF) @ tensors["down_proj.weight"].T
    return rms_norm(h_TD, tensors["norm.weight"], eps)


def reference_forward(
    config: ModelConfig, weights: ModelWeights, ids: Sequence[int], exit_layer: int
) -> Tensor:
    """Logits [T, V] of one sequence that runs the first ``exit_layer`` layers."""
    angles_TH = torch.arange(len(ids))[:, None].float() * weights.inv_freq.repeat(2)
    cos_TH = angles_TH.cos() * weights.rope_attention_scaling
    sin_TH = angles_TH.sin() * weights.rope_attention_scaling
    h_TD = weights.embed[torch.tensor(list(ids))]
    module = weights.exit_modules.get(exit_layer)
    layers = weights.layers[:exit_layer]
    if module is not None and module.layer is not None:
        layers.append(_whole(module.layer))
    for layer in layers:
        x_TD = rms_norm(h_TD, layer.input_norm, config.rms_norm_eps)
        h_TD = h_TD + _attention(config, layer, x_TD, cos_TH, sin_TH)
        x_TD = rms_norm(h_TD, layer.post_attention_norm, config.rms_norm_eps)
        gate_TF, up_TF = linear(x_TD, _matrix(layer.gate_up), layer.gate_up_bias).chunk(2, dim=-1)
        h_TD = h_TD + linear(silu(gate_TF) * up_TF, _matrix(layer.down), layer.down_bias)
    if module is None:
        h_TD = rms_norm(h_TD, weights.final_norm, config.rms_norm_eps)
    else:
        h_TD = apply_exit_module(h_TD, module.tensors, config.rms_norm_eps)
    own = None if module is None else module.head
    return linear(h_TD, _matrix(own or weights.lm_head))


def _whole(own: OwnLayerWeights) -> LayerWeights:
    """With queries, keys and values in one."""
    fields = {**vars(own), "qkv": Weight.concat([own.q, own.kv])}
    if own.q_bias is not None and own.kv_bias is not None:
        fields["qkv_bias"] = torch.cat([own.q_bias, own.kv_bias])
    for name in ("q", "q_bias", "kv", "kv_bias"):
        del fields[name]
    return LayerWeights(**fields)


def _matrix(weight: Weight) -> Tensor:
    """[O, I] in fp32."""
    return weight.dequantize(torch.float32)


def _attention(
    config: ModelConfig, layer: LayerWeights, x_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor
) -> Tensor:
    num_tokens = x_TD.shape[0]
    qkv = linear(x_TD, _matrix(layer.qkv), layer.qkv_bias)
    sizes = [config.q_size, config.kv_size, config.kv_size]
    q_NTH, k_KTH, v_KTH = (
        part.view(num_tokens, -1, config.head_dim).transpose(0, 1)
        for part in torch.split(qkv, sizes, -1)
    )
    if layer.q_norm is not None and layer.k_norm is not None:
        q_NTH = rms_norm(q_NTH, layer.q_norm, config.rms_norm_eps)
        k_KTH = rms_norm(k_KTH, layer.k_norm, config.rms_norm_eps)
    q_NTH, k_KTH = (x * cos_TH + _rotate_half(x) * sin_TH for x in (q_NTH, k_KTH))
    group = config.num_heads // config.num_kv_heads
    k_NTH, v_NTH = (x.repeat_interleave(group, dim=0) for x in (k_KTH, v_KTH))
    scores_NTT = q_NTH @ k_NTH.transpose(1, 2) / config.head_dim**0.5
    future_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    out_NTH = scores_NTT.masked_fill(future_TT, float("-inf")).softmax(-1) @ v_NTH
    return linear(
        out_NTH.transpose(0, 1).reshape(num_tokens, -1),
        _matrix(layer.o),
        layer.o_bias,
    )


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
