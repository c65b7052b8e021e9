"""Attention by the Triton kernels, which read pages in place.

A step's rows of one token and its chunks are separate launches over all rows: a program finds from
the batch's own tensors whether its row is one of its kind, so nothing is prepared on the host but
the sizes of the grids, which come from the batch's tuples.

Shape legend: see ``reference/attention.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sortserve.model.attention import HeadNorms, RopeTables, SlabAttention, without_queries
from sortserve.model.backends.triton.heads import TritonHeads
from sortserve.model.backends.triton.kernels.attention import (
    combine_kernel,
    decode_kernel,
    prefill_kernel,
)
from sortserve.model.backends.triton.tiles import (
    SMALLEST_DOT,
    Tiles,
    next_power_of_two,
    num_splits,
)
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["TritonAttention"]

_LOG2_E = math.log2(math.e)


class TritonAttention:
    """See ``Attention``.

    Args:
        config: sizes of the heads.
        rope: on the device.
        tiles: how the work is cut.
    """

    def __init__(self, config: ModelConfig, rope: RopeTables, tiles: Tiles) -> None:
        self.config = config
        self.rope = rope
        self.tiles = tiles
        # Parts of contexts, for one layer at a time: allocated once, so that a CUDA graph finds
        # them where they were.
        num_parts = max(1, tiles.programs // config.num_kv_heads) * config.num_heads
        device = rope.cos.device
        self.part_out = torch.empty(num_parts * config.head_dim, device=device)
        self.part_sums = torch.empty(num_parts, device=device)

    def prepare(self, batch: Batch, slabs: range, num_rows: int) -> Sequence[SlabAttention]:
        """See Attention."""
        return [_TritonSlab(self, batch, slab, num_rows) for slab in slabs]

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
        assert len(kv_TX) == batch.query_starts[num_rows]
        heads = TritonHeads(without_queries(self.config), self.rope, self.tiles, batch, slab)
        heads(kv_TX.contiguous(), HeadNorms.of_keys(key_norm), layer_pages)


class _TritonSlab:
    """One slab, layer by layer."""

    def __init__(self, attention: TritonAttention, batch: Batch, slab: int, num_rows: int) -> None:
        self._attention = attention
        self._batch = batch
        self._slab = slab
        self._num_rows = num_rows
        self._heads = TritonHeads(attention.config, attention.rope, attention.tiles, batch, slab)
        self._num_tokens = batch.query_starts[num_rows]
        starts = batch.query_starts[: num_rows + 1]
        counts = [end - start for start, end in itertools.pairwise(starts)]
        self._has_tokens = 1 in counts
        self._has_chunks = max(counts) > 1

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """See SlabAttention; queries in ``qkv_TX`` are normed and rotated in place."""
        attention = self._attention
        qkv_TX = qkv_TX.contiguous()
        self._heads(qkv_TX, norms, layer_pages)
        out_TX = qkv_TX.new_empty(self._num_tokens, attention.config.q_size)
        if self._has_tokens:
            self._decode(qkv_TX, layer_pages, out_TX)
        if self._has_chunks:
            self._prefill(qkv_TX, layer_pages, out_TX)
        return out_TX

    def _decode(self, qkv_TX: Tensor, layer_pages: Tensor, out_TX: Tensor) -> None:
        attention, batch = self._attention, self._batch
        config, tiles = attention.config, attention.tiles
        group = config.num_heads // config.num_kv_heads
        splits = num_splits(self._num_rows, config.num_kv_heads, tiles.programs)
        padded_head_dim = next_power_of_two(max(SMALLEST_DOT, config.head_dim))
        decode_kernel[(self._num_rows, config.num_kv_heads, splits)](
            qkv_TX,
            layer_pages,
            layer_pages.stride(0),
            batch.block_tables_SRB,
            batch.context_lens_R,
            batch.query_starts_R1,
            out_TX,
            attention.part_out,
            attention.part_sums,
            self._slab,
            batch.block_tables_SRB.shape[1],
            batch.block_tables_SRB.shape[2],
            config.head_dim**-0.5 * _LOG2_E,
            NUM_HEADS=config.num_heads,
            NUM_KV_HEADS=config.num_kv_heads,
            HEAD_DIM=config.head_dim,
            PADDED_GROUP=next_power_of_two(max(SMALLEST_DOT, group)),
            PADDED_HEAD_DIM=padded_head_dim,
            BLOCK_SIZE=layer_pages.shape[3],
            KEYS=tiles.keys,
            SPLITS=splits,
            num_stages=tiles.num_stages,
        )
        if splits > 1:
            combine_kernel[(self._num_rows, config.num_heads)](
                attention.part_out,
                attention.part_sums,
                batch.query_starts_R1,
                out_TX,
                NUM_HEADS=config.num_heads,
                HEAD_DIM=config.head_dim,
                PADDED_HEAD_DIM=padded_head_dim,
                SPLITS=splits,
            )

    def _prefill(self, qkv_TX: Tensor, layer_pages: Tensor, out_TX: Tensor) -> None:
        attention, batch = self._attention, self._batch
        config, tiles = attention.config, attention.tiles
        num_blocks = self._num_tokens // tiles.queries + self._num_rows
        prefill_kernel[(config.num_heads, num_blocks)](
            qkv_TX,
            layer_pages,
            layer_pages.stride(0),
            batch.block_tables_SRB,
            batch.context_lens_R,
            batch.query_starts_R1,
            out_TX,
            self._slab,
            self._num_rows,
            num_blocks,
            batch.block_tables_SRB.shape[1],
            batch.block_tables_SRB.shape[2],
            config.head_dim**-0.5 * _LOG2_E,
            NUM_HEADS=config.num_heads,
            NUM_KV_HEADS=config.num_kv_heads,
            HEAD_DIM=config.head_dim,
            PADDED_HEAD_DIM=next_power_of_two(max(SMALLEST_DOT, config.head_dim)),
            BLOCK_SIZE=layer_pages.shape[3],
            QUERIES=tiles.queries,
            KEYS=tiles.keys,
            num_stages=tiles.num_stages,
        )
