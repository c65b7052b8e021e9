"""What every implementation of attention works on: the paged KV cache, and the interface.

One entry point per layer does everything between the QKV projection and the output projection:
query and key norms, RoPE, the write of new keys and values, attention.

Shape legend: T tokens, N query heads, K key/value heads, H head_dim, P pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sortserve.core.slabs import Slabs
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig
from sortserve.model.large_pages import large_pages

__all__ = [
    "Attention",
    "HeadNorms",
    "KVCache",
    "RopeTables",
    "SlabAttention",
    "without_queries",
]


class KVCache:
    """One pool of pages; a page holds ``block_size`` tokens of one slab.

    ``pages`` is [planes of a page, 2, P, K, block_size, H]: the first index is the layer's place in
    its slab (``Slabs.place``), the second 0 for keys and 1 for values.
    """

    def __init__(self, pages: Tensor, slabs: Slabs) -> None:
        assert pages.dim() == 6
        assert pages.shape[:2] == (slabs.size, 2)
        self.pages = pages
        self.slabs = slabs

    @staticmethod
    def allocate(
        config: ModelConfig,
        slabs: Slabs,
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """A zeroed pool: padding that attention masks out must be finite.

        On a CPU the system zeroes it as it is first touched: a large pool costs nothing until it is
        used, but for the first pages of a layer, which come together (``large_pages``).
        """
        shape = (slabs.size, 2, num_pages, config.num_kv_heads, block_size, config.head_dim)
        if torch.device(device).type != "cpu":
            return KVCache(torch.zeros(shape, dtype=dtype, device=device), slabs)
        memory = large_pages(math.prod(shape) * dtype.itemsize)
        return KVCache(memory.view(dtype).view(shape), slabs)

    @staticmethod
    def page_bytes(config: ModelConfig, slab_size: int, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page: keys and values of ``block_size`` tokens in ``slab_size`` layers."""
        return slab_size * 2 * config.kv_size * block_size * dtype.itemsize

    @property
    def num_pages(self) -> int:
        """P."""
        return self.pages.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[4]


@dataclass(frozen=True)
class RopeTables:
    """Cosines and sines by position, fp32 [max_model_len, H / 2]."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def build(inv_freq: Tensor, attention_scaling: float, max_model_len: int) -> RopeTables:
        """Tables for positions 0 to ``max_model_len`` - 1; ``inv_freq`` is [H / 2] fp32."""
        positions = torch.arange(max_model_len, device=inv_freq.device, dtype=torch.float32)
        angles = positions[:, None] * inv_freq[None].float()
        return RopeTables(angles.cos() * attention_scaling, angles.sin() * attention_scaling)


@dataclass(frozen=True)
class HeadNorms:
    """Weights [H] of the RMSNorm over each query and key head (Qwen3)."""

    query: Tensor
    key: Tensor

    @staticmethod
    def of_keys(key: Tensor | None) -> HeadNorms | None:
        """Where there are no queries."""
        return None if key is None else HeadNorms(key, key)


def without_queries(config: ModelConfig) -> ModelConfig:
    """The sizes of heads where there are keys and values alone."""
    return replace(config, num_heads=0)


class SlabAttention(Protocol):
    """Attention for the rows alive in one slab of one step."""

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """One layer: [T, (N + 2K) H] to [T, N H]; keys and values go to ``layer_pages``.

        ``qkv_TX`` may be overwritten.
        """
        ...


class Attention(Protocol):
    """A way to compute attention."""

    def prepare(self, batch: Batch, slabs: range, num_rows: int) -> Sequence[SlabAttention]:
        """For each slab, what its layers share; the first ``num_rows`` rows are alive in all."""
        ...

    def write(
        self,
        batch: Batch,
        slab: int,
        num_rows: int,
        kv_TX: Tensor,
        key_norm: Tensor | None,
        layer_pages: Tensor,
    ) -> None:
        """Write the keys and values of one layer, without attention.

        Args:
            batch: the step.
            slab: of the layer.
            num_rows: the first rows of the batch, all alive in the slab.
            kv_TX: [T, 2K H], of their tokens; may be overwritten.
            key_norm: [H], over each key head; None: there is none.
            layer_pages: of the layer.
        """
        ...
