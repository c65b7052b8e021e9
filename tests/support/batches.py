"""Batches for the decoder, straight from the definition of their fields.

pages = Pages(64)
table = pages.table(num_slabs=3, num_tokens=20)
logits_RV = run_chunks(decoder, cache, [Chunk(ids, 0, exit_layer=6, table_SB=table)])
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.model.attention import KVCache
from sortserve.model.batch import Batch
from sortserve.model.decoder import Decoder
from sortserve.model.host_batch import HostBatch

__all__ = [
    "BLOCK_SIZE",
    "Chunk",
    "Pages",
    "host_batch_of",
    "make_batch",
    "random_ids",
    "run_chunks",
]

BLOCK_SIZE = 8


@dataclass(frozen=True)
class Chunk:
    """Some tokens of one sequence, and the pages of the sequence."""

    ids: Sequence[int]
    start: int
    exit_layer: int
    table_SB: NDArray[np.int32]
    samples: bool = True


def make_batch(chunks: Sequence[Chunk], num_slabs: int) -> Batch:
    """A batch by the definition of its fields, one row after another."""
    max_blocks = max(math.ceil((c.start + len(c.ids)) / BLOCK_SIZE) for c in chunks)
    tables = torch.full((num_slabs, len(chunks), max_blocks), -1, dtype=torch.int32)
    slots: list[list[int]] = [[] for _ in range(num_slabs)]
    starts = [0]
    for r, chunk in enumerate(chunks):
        starts.append(starts[-1] + len(chunk.ids))
        num_blocks = math.ceil((chunk.start + len(chunk.ids)) / BLOCK_SIZE)
        for s in range(num_slabs):
            alive = s < chunk.table_SB.shape[0]
            if alive:
                tables[s, r, :num_blocks] = torch.from_numpy(chunk.table_SB[s, :num_blocks])
            for position in range(chunk.start, chunk.start + len(chunk.ids)):
                page = int(chunk.table_SB[s, position // BLOCK_SIZE]) if alive else 0
                slots[s].append(page * BLOCK_SIZE + position % BLOCK_SIZE if alive else -1)
    context_lens = tuple(c.start + len(c.ids) for c in chunks)
    positions = [p for c in chunks for p in range(c.start, c.start + len(c.ids))]
    return Batch(
        token_ids_T=torch.tensor([i for c in chunks for i in c.ids]),
        positions_T=torch.tensor(positions),
        query_starts=tuple(starts),
        context_lens=context_lens,
        exit_layers=tuple(c.exit_layer for c in chunks),
        samples=tuple(c.samples for c in chunks),
        query_starts_R1=torch.tensor(starts, dtype=torch.int32),
        context_lens_R=torch.tensor(context_lens, dtype=torch.int32),
        block_tables_SRB=tables,
        slots_ST=torch.tensor(slots),
    )


def host_batch_of(batch: Batch) -> HostBatch:
    """The batch as it is before it is uploaded."""
    return HostBatch(
        token_ids_T=batch.token_ids_T.numpy(),
        positions_T=batch.positions_T.numpy(),
        query_starts=batch.query_starts,
        context_lens=batch.context_lens,
        exit_layers=batch.exit_layers,
        samples=batch.samples,
        block_tables_SRB=batch.block_tables_SRB.numpy(),
        slots_ST=batch.slots_ST.numpy(),
    )


class Pages:
    """Hands out pages in a scattered order."""

    def __init__(self, num_pages: int, seed: int = 0) -> None:
        self._free = list(np.random.default_rng(seed).permutation(num_pages))

    def table(self, num_slabs: int, num_tokens: int) -> NDArray[np.int32]:
        blocks = math.ceil(num_tokens / BLOCK_SIZE)
        pages = [self._free.pop() for _ in range(num_slabs * blocks)]
        return np.array(pages, dtype=np.int32).reshape(num_slabs, blocks)


def random_ids(count: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 280, count)]


def run_chunks(decoder: Decoder, cache: KVCache, chunks: Sequence[Chunk]) -> Tensor:
    """The logits of the chunks that sample."""
    batch = make_batch(chunks, decoder.num_slabs)
    exits = list(itertools.compress(batch.exit_layers, batch.samples))
    logits_RV: Tensor = decoder.logits(decoder.forward(batch, cache), exits)
    return logits_RV
