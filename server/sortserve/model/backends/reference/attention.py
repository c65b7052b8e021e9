"""Attention in plain torch: the definition that faster versions are tested against.

Shape legend: T tokens, R rows, S slabs, B blocks of the longest row, N query heads, K key/value
heads, G = N / K, H head_dim
X = (N + 2K) * H, C cached tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sortserve.model.attention import HeadNorms, RopeTables, SlabAttention, without_queries
from sortserve.model.backends.reference.heads import ReferenceHeads
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["ReferenceAttention", "attend_chunk"]


class ReferenceAttention:
    """Plain torch on any device: gathers a row's pages, then ``scaled_dot_product_attention``."""

    def __init__(self, config: ModelConfig, rope: RopeTables) -> None:
        self.config = config
        self.rope = rope

    def prepare(self, batch: Batch, slabs: range, num_rows: int) -> Sequence[SlabAttention]:
        """See Attention."""
        return [_ReferenceSlab(self.config, self.rope, batch, slab, num_rows) for slab in slabs]

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
        heads = ReferenceHeads(without_queries(self.config), self.rope, batch, slab, num_rows)
        heads(kv_TX, HeadNorms.of_keys(key_norm), layer_pages)


class _ReferenceSlab:
    """Rows of one token go together, padded to the longest; longer chunks go one by one."""

    def __init__(
        self, config: ModelConfig, rope: RopeTables, batch: Batch, slab: int, num_rows: int
    ) -> None:
        self._config = config
        self._heads = ReferenceHeads(config, rope, batch, slab, num_rows)
        self._query_starts = batch.query_starts[: num_rows + 1]
        self._context_lens = batch.context_lens[:num_rows]
        # A row's padding points at the row's own first page, so that no row ever reads another's.
        tables_RB = batch.block_tables_SRB[slab, :num_rows].long()
        self._tables_RB = torch.where(tables_RB < 0, tables_RB[:, :1], tables_RB)

        num_single = sum(self._row_tokens(r) == 1 for r in range(num_rows))
        self._decode_rows = batch.single_rows_N[:num_single]
        self._decode_tokens = batch.query_starts_R1.long()[self._decode_rows]
        self._decode_tables = self._tables_RB[self._decode_rows]
        self._decode_lens = batch.context_lens_R[self._decode_rows]

    def _row_tokens(self, row: int) -> int:
        return self._query_starts[row + 1] - self._query_starts[row]

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """See SlabAttention."""
        q_TNH = self._heads(qkv_TX, norms, layer_pages)
        out_TNH = torch.empty_like(q_TNH)
        if len(self._decode_rows):
            out_TNH[self._decode_tokens] = self._decode(q_TNH[self._decode_tokens], layer_pages)
        for row, tokens in self._chunks():
            out_TNH[tokens] = attend_chunk(
                q_TNH[tokens], self._tables_RB[row], self._context_lens[row], layer_pages
            )
        return out_TNH.flatten(1)

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        for row in range(len(self._context_lens)):
            if self._row_tokens(row) > 1:
                yield row, slice(self._query_starts[row], self._query_starts[row + 1])

    def _decode(self, q_RNH: Tensor, layer_pages: Tensor) -> Tensor:
        """One token a row: a key/value head's G query heads stand where query tokens would."""
        q_RKGH = q_RNH.view(len(q_RNH), self._config.num_kv_heads, -1, self._config.head_dim)
        # [R, B, K, block_size, H] -> [R, K, C, H]
        k_RKCH, v_RKCH = (
            self._gather(pages).transpose(1, 2).flatten(2, 3) for pages in layer_pages
        )
        columns_C = torch.arange(k_RKCH.shape[2], device=q_RNH.device)
        mask_R11C = (columns_C < self._decode_lens[:, None])[:, None, None]
        out_RKGH = scaled_dot_product_attention(q_RKGH, k_RKCH, v_RKCH, attn_mask=mask_R11C)
        return out_RKGH.flatten(1, 2)

    def _gather(self, pages: Tensor) -> Tensor:
        """The pages of the decoding rows, [R, B, K, block_size, H], with zeros past a row's end.

        What a page held before may not be finite, and NaN stays NaN where attention masks it out.
        """
        gathered = pages[self._decode_tables]
        num_blocks, block_size = gathered.shape[1], gathered.shape[3]
        columns_BC = torch.arange(num_blocks * block_size, device=pages.device)
        past_end_RBC = columns_BC.view(num_blocks, block_size) >= self._decode_lens[:, None, None]
        return gathered.masked_fill_(past_end_RBC[:, :, None, :, None], 0.0)


def attend_chunk(q_TNH: Tensor, table_B: Tensor, context_len: int, layer_pages: Tensor) -> Tensor:
    """Attention of the last T of ``context_len`` tokens of one row: [T, N, H] to [T, N, H]."""
    num_tokens = q_TNH.shape[0]
    pages_B = table_B[: math.ceil(context_len / layer_pages.shape[3])]
    # [B, K, block_size, H] -> [1, K, C, H]
    k_1KCH, v_1KCH = (
        pages[pages_B].transpose(0, 1).flatten(1, 2)[None, :, :context_len] for pages in layer_pages
    )
    whole = num_tokens == context_len
    out_1NTH = scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_1KCH,
        v_1KCH,
        attn_mask=None if whole else _causal_mask(num_tokens, context_len, q_TNH.device),
        is_causal=whole,
        enable_gqa=True,
    )
    return out_1NTH[0].transpose(0, 1)


def _causal_mask(num_tokens: int, context_len: int, device: torch.device) -> Tensor:
    """[T, C]: the last T of C positions, each seeing itself and all before it."""
    ones_TC = torch.ones(num_tokens, context_len, dtype=torch.bool, device=device)
    return ones_TC.tril(context_len - num_tokens)
