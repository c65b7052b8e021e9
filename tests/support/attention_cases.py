"""One layer's attention over random pages, for any backend.

case = Case(make_config(num_heads=6, num_kv_heads=2, head_dim=64), rows=[(30, 1), (0, 20)])
out_TX, pages = case.run(attention)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sortserve.core.slabs import Slabs
from sortserve.model.attention import Attention, HeadNorms, KVCache, RopeTables
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["MIXED_ROWS", "Case", "make_config", "make_rope"]

MAX_LEN = 1400
MIXED_ROWS = [(0, 1), (30, 1), (0, 20), (15, 1), (5, 3), (0, 8), (33, 12), (64, 1)]


def make_config(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=1,
        hidden_size=num_heads * head_dim,
        intermediate_size=32,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=True,
    )


def make_rope(head_dim: int) -> RopeTables:
    inv_freq = 10_000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return RopeTables.build(inv_freq, 1.0, MAX_LEN)


class Case:
    """One layer's inputs for rows of (cached tokens, new tokens), pages scattered."""

    def __init__(
        self,
        config: ModelConfig,
        rows: Sequence[tuple[int, int]],
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        lens = [start + count for start, count in rows]
        num_blocks = [math.ceil(n / block_size) for n in lens]
        num_pages = sum(num_blocks) + 3
        free = torch.randperm(num_pages, generator=self.generator).int()
        tables = torch.full((1, len(rows), max(num_blocks)), -1, dtype=torch.int32)
        for r, (table, count) in enumerate(
            zip(free[: sum(num_blocks)].split_with_sizes(num_blocks), num_blocks, strict=True)
        ):
            tables[0, r, :count] = table
        positions = torch.cat(
            [torch.arange(n - count, n) for (_, count), n in zip(rows, lens, strict=True)]
        )
        row_T = torch.arange(len(rows)).repeat_interleave(torch.tensor([c for _, c in rows]))
        starts = [0]
        for _, count in rows:
            starts.append(starts[-1] + count)
        self.batch = Batch(
            token_ids_T=torch.zeros_like(positions),
            positions_T=positions,
            query_starts=tuple(starts),
            context_lens=tuple(lens),
            exit_layers=(1,) * len(rows),
            samples=(True,) * len(rows),
            query_starts_R1=torch.tensor(starts, dtype=torch.int32),
            context_lens_R=torch.tensor(lens, dtype=torch.int32),
            block_tables_SRB=tables,
            slots_ST=(
                tables[0, row_T, positions // block_size].long() * block_size
                + positions % block_size
            )[None],
        )
        cache = KVCache.allocate(config, Slabs(1), num_pages, block_size, dtype, "cpu")
        self.pages = self.random(*cache.pages[0].shape).to(dtype)
        self.qkv_TX = self.random(starts[-1], config.q_size + 2 * config.kv_size).to(dtype)
        self.norms = HeadNorms(
            (1 + 0.3 * self.random(config.head_dim)).to(dtype),
            (1 + 0.3 * self.random(config.head_dim)).to(dtype),
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def run(self, attention: Attention, *, norms: bool = False) -> tuple[Tensor, Tensor]:
        """(output, pages), leaving the inputs as they are."""
        pages, rows = self.pages.clone(), self.batch.num_rows
        (attend,) = attention.prepare(self.batch, range(1), rows)
        return attend(self.qkv_TX.clone(), self.norms if norms else None, pages), pages

    def run_apart(self, attention: Attention, *, norms: bool = False) -> tuple[Tensor, Tensor]:
        """The same, keys and values first and without queries, and then the queries without them:
        so there is nothing in their places, and nothing to write.
        """
        pages, rows, q_size = self.pages.clone(), self.batch.num_rows, self.config.q_size
        key_norm = self.norms.key if norms else None
        kv_TX = self.qkv_TX[:, q_size:].contiguous()
        attention.write(self.batch, 0, rows, kv_TX, key_norm, pages)
        nowhere = torch.full_like(self.batch.slots_ST, -1)
        reading = replace(self.batch, slots_ST=nowhere, writes=False)
        qkv_TX = self.qkv_TX.clone()
        qkv_TX[:, q_size:] = torch.nan
        (attend,) = attention.prepare(reading, range(1), rows)
        return attend(qkv_TX, self.norms if norms else None, pages), pages
