"""Attention within each example of a packed row, for training.

A packed row is several examples end to end, [1, T]. transformers' own packed attention on a CPU
builds a [T, T] mask and runs SDPA, whose bf16 backward takes most of a step. Here each example
attends alone, so the cost is the sum of squares of the lengths, and in bf16 on a CPU two matrix
products with a softmax between take under half the time of SDPA and its backward
(`python -m benchmarks.train --profile`).

On a GPU all examples attend in one call (``device_attention``).

Shape legend: T tokens of the row, S tokens of one example, N query heads, K key/value heads,
G = N / K, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from sortserve_trainer.model import device_attention
from sortserve_trainer.model.device_attention import PackedLengths, attend_on_device

__all__ = ["PACKED_ATTENTION", "packed_attention"]

PACKED_ATTENTION = "sortserve_packed"
"""Name under which transformers' models find it (``attn_implementation``)."""


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function over a packed row.

    Args:
        module: the attention layer; ``sliding_window`` of it is not heeded, see ``lengths``.
        query: [1, N, T, H].
        key: [1, K, T, H].
        value: [1, K, T, H].
        attention_mask: always None: examples are cut by ``lengths``.
        scaling: of the scores; by default 1 / sqrt(H).
        dropout: probability on the attention weights.
        lengths: tokens of each example, in order, summing to T; None is one example. No example
            may be longer than a sliding window of the model, which the data loader sees to. As
            ``PackedLengths``, made once for all layers, where the host must not wait for a GPU.

    Returns:
        [1, T, N, H], and None for the weights.
    """
    assert attention_mask is None
    assert query.shape[0] == 1, "a batch is one packed row"
    num_tokens, head_dim = query.shape[2], query.shape[3]
    scale = head_dim**-0.5 if scaling is None else scaling
    if device_attention.in_one_call(query.device):
        packed = PackedLengths.of(lengths or (num_tokens,), query.device)
        out_TNH = attend_on_device(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            packed,
            scale,
            dropout,
        )
        return out_TNH[None], None
    attend = _products if _products_are_faster(query) and not dropout else _sdpa
    parts, start = [], 0
    for length in lengths or (num_tokens,):
        span = slice(start, start + length)
        parts.append(attend(query[0, :, span], key[0, :, span], value[0, :, span], scale, dropout))
        start += length
    assert start == num_tokens, "lengths sum to the tokens of the row"
    return torch.cat(parts, dim=1).transpose(0, 1).unsqueeze(0), None


def _products_are_faster(query: Tensor) -> bool:
    """Measured on AVX-512 CPUs: in fp32, and on GPUs, SDPA is the faster one."""
    return query.device.type == "cpu" and query.dtype is torch.bfloat16


def _sdpa(q_NSH: Tensor, k_KSH: Tensor, v_KSH: Tensor, scale: float, dropout: float) -> Tensor:
    groups = q_NSH.shape[0] // k_KSH.shape[0]
    out: Tensor = scaled_dot_product_attention(
        q_NSH[None],
        k_KSH.repeat_interleave(groups, dim=0)[None],
        v_KSH.repeat_interleave(groups, dim=0)[None],
        is_causal=True,
        scale=scale,
        dropout_p=dropout,
    )[0]
    return out


def _products(q_NSH: Tensor, k_KSH: Tensor, v_KSH: Tensor, scale: float, _: float) -> Tensor:
    """Two batched products; the heads of a group share one, so keys are never repeated."""
    num_heads, length, head_dim = q_NSH.shape
    num_kv_heads = k_KSH.shape[0]
    q_KGSH = (q_NSH * scale).reshape(num_kv_heads, -1, head_dim)
    scores = torch.matmul(q_KGSH, k_KSH.transpose(1, 2)).view(-1, length, length)
    future = torch.full((length, length), -torch.inf, dtype=scores.dtype, device=scores.device)
    weights = (scores + future.triu(1)).softmax(dim=-1)
    out = torch.matmul(weights.view(num_kv_heads, -1, length), v_KSH)
    return out.view(num_heads, length, head_dim)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
