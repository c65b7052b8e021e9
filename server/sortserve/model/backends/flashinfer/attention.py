"""Attention by FlashInfer over our pages, which are its ``HND`` layout as they lie.

Steps of one token a row go to its decode wrapper, others to its prefill wrapper, in which such rows
are chunks of one token. A wrapper holds one plan, which all layers of a slab share; slabs have
pages of their own, so every slab has a plan in every step. A plan copies from pinned memory of its
wrapper while the host goes on, so a wrapper is planned again only after another one: each slab
has two, in turn.

https://docs.flashinfer.ai, written for versions 0.4 to 0.7. Shape legend: see
``reference/attention.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.model.attention import HeadNorms, RopeTables, SlabAttention, without_queries
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["FlashInferAttention", "Heads", "MakeHeads"]

_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends."""
_GROUP_FOR_TENSOR_CORES = 4
"""Query heads of a key/value head from which on tensor cores pay in decoding."""


class Heads(Protocol):
    """What comes before attention; see ``ReferenceHeads``."""

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """The queries, [T, N, H]; keys and values go to ``layer_pages``."""
        ...


MakeHeads = Callable[[ModelConfig, RopeTables, Batch, int, int], Heads]
"""Of the sizes, the step, a slab, and how many rows are alive."""


class FlashInferAttention:
    """See ``Attention``.

    Args:
        config: sizes of the heads.
        rope: on the device.
        module: the package ``flashinfer``.
        make_heads: what comes before attention.
    """

    def __init__(
        self, config: ModelConfig, rope: RopeTables, module: Any, make_heads: MakeHeads
    ) -> None:
        self.config = config
        self.rope = rope
        self.make_heads = make_heads
        self._module = module
        self._device = rope.cos.device
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        self._wrappers: dict[tuple[int, bool], itertools.cycle[Any]] = {}

    def prepare(self, batch: Batch, slabs: range, num_rows: int) -> Sequence[SlabAttention]:
        """See Attention."""
        rows = _Rows(batch, num_rows, self._device)
        return [_FlashInferSlab(self, rows, slab) for slab in slabs]

    def write(
        self,
        batch: Batch,
        slab: int,
        num_rows: int,
        kv_TX: Tensor,
        key_norm: Tensor | None,
        layer_pages: Tensor,
    ) -> None:
        """See Attention: what comes before attention, for no query heads."""
        heads = self.make_heads(without_queries(self.config), self.rope, batch, slab, num_rows)
        heads(kv_TX.contiguous(), HeadNorms.of_keys(key_norm), layer_pages)

    def next_wrapper(self, slab: int, *, decodes: bool) -> Any:
        """The one of the slab that was planned longer ago."""
        key = (slab, decodes)
        if key not in self._wrappers:
            self._wrappers[key] = itertools.cycle([self._wrapper(decodes) for _ in range(2)])
        return next(self._wrappers[key])

    def _wrapper(self, decodes: bool) -> Any:
        if not decodes:
            return self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        group = self.config.num_heads // self.config.num_kv_heads
        return self._module.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_tensor_cores=group >= _GROUP_FOR_TENSOR_CORES
        )


class _Rows:
    """The rows alive in some slabs of a step, but for their pages."""

    def __init__(self, batch: Batch, num_rows: int, device: torch.device) -> None:
        self.batch = batch
        self.num_rows = num_rows
        self.num_tokens = batch.query_starts[num_rows]
        self.decodes = self.num_tokens == num_rows
        self.context_lens = np.array(batch.context_lens[:num_rows], dtype=np.int32)
        self.query_starts = torch.tensor(batch.query_starts[: num_rows + 1], dtype=torch.int32)
        self._device = device
        self._block_size = 0
        self._places: Tensor | None = None

    def page_starts(self, block_size: int) -> Tensor:
        """Int32 [R + 1], on the host: where each row's pages begin among the pages of all."""
        starts = np.concatenate([[0], np.cumsum(self._num_blocks(block_size))])
        return torch.from_numpy(starts.astype(np.int32))

    def last_page_lens(self, block_size: int) -> Tensor:
        """Int32 [R], on the host: tokens of each row's last page."""
        return torch.from_numpy((self.context_lens - 1) % block_size + 1)

    def pages(self, slab: int, block_size: int) -> Tensor:
        """Int32, on the device: the pages of all rows, one row after another."""
        if self._places is None or block_size != self._block_size:
            self._block_size, self._places = block_size, self._find_places(block_size)
        return self.batch.block_tables_SRB[slab].flatten()[self._places]

    def _find_places(self, block_size: int) -> Tensor:
        """Where in a slab's block tables, flattened, the pages of rows are."""
        num_blocks = self._num_blocks(block_size)
        width = self.batch.block_tables_SRB.shape[2]
        places = [row * width + np.arange(count) for row, count in enumerate(num_blocks)]
        return torch.from_numpy(np.concatenate(places)).to(self._device, non_blocking=True)

    def _num_blocks(self, block_size: int) -> NDArray[np.int32]:
        return -(-self.context_lens // block_size)


class _FlashInferSlab:
    """One slab, layer by layer; planned at the first."""

    def __init__(self, attention: FlashInferAttention, rows: _Rows, slab: int) -> None:
        self._attention = attention
        self._rows = rows
        self._slab = slab
        self._wrapper: Any = None
        self._heads = attention.make_heads(
            attention.config, attention.rope, rows.batch, slab, rows.num_rows
        )

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """See SlabAttention."""
        if self._wrapper is None:
            self._wrapper = self._plan(qkv_TX.dtype, layer_pages.shape[3])
        q_TNH = self._heads(qkv_TX.contiguous(), norms, layer_pages).contiguous()
        out_TNH: Tensor = self._wrapper.run(q_TNH, (layer_pages[0], layer_pages[1]))
        return out_TNH.flatten(1)

    def _plan(self, dtype: torch.dtype, block_size: int) -> Any:
        config, rows = self._attention.config, self._rows
        wrapper = self._attention.next_wrapper(self._slab, decodes=rows.decodes)
        pages = (
            rows.page_starts(block_size),
            rows.pages(self._slab, block_size),
            rows.last_page_lens(block_size),
        )
        sizes = (config.num_heads, config.num_kv_heads, config.head_dim, block_size)
        options = {"q_data_type": dtype, "kv_data_type": dtype, "sm_scale": config.head_dim**-0.5}
        if rows.decodes:
            wrapper.plan(*pages, *sizes, **options)
        else:
            wrapper.plan(rows.query_starts, *pages, *sizes, causal=True, **options)
        return wrapper
