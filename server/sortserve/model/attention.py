"""What every implementation of attention works on: the paged KV cache, and the interface.

One entry point per layer does everything between the QKV projection and the output projection:
query and key norms, RoPE, the write of new keys and values, attention.

Shape legend: T tokens, N query heads, K key/value heads, H head_dim, P pages.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["Attention", "HeadNorms", "KVCache", "RopeTables", "SlabAttention"]


class KVCache:
    """One pool of pages; a page holds ``block_size`` tokens of one slab.

    ``pages`` is [slab_size, 2, P, K, block_size, H]: the first index is the layer inside the slab,
    the second 0 for keys and 1 for values. Layer l of a model uses ``pages[l % slab_size]`` with
    the page ids of slab ``l // slab_size``.
    """

    def __init__(self, pages: Tensor) -> None:
        assert pages.dim() == 6
        assert pages.shape[1] == 2
        self.pages = pages

    @staticmethod
    def allocate(
        config: ModelConfig,
        slab_size: int,
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """A zeroed pool: padding that attention masks out must be finite.

        On a CPU it is anonymous memory, zeroed by the kernel when a page is first touched: a large
        pool costs nothing until it is used.
        """
        shape = (slab_size, 2, num_pages, config.num_kv_heads, block_size, config.head_dim)
        if torch.device(device).type != "cpu":
            return KVCache(torch.zeros(shape, dtype=dtype, device=device))
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        return KVCache(torch.frombuffer(memory, dtype=dtype).view(shape))

    @staticmethod
    def page_bytes(config: ModelConfig, slab_size: int, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page: keys and values of ``block_size`` tokens in ``slab_size`` layers."""
        return slab_size * 2 * config.kv_size * block_size * dtype.itemsize

    @property
    def slab_size(self) -> int:
        """Layers of a slab."""
        return self.pages.shape[0]

    @property
    def num_pages(self) -> int:
        """P."""
        return self.pages.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[4]

    def layer(self, layer: int) -> Tensor:
        """[2, P, K, block_size, H]: the keys and values of one layer."""
        return self.pages[layer % self.slab_size]


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
