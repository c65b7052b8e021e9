"""Attention on the CPU by the C++ kernels, which read pages in place.

Tokens that attend on their own go through ``kernels/attention.cpp``: in fp32 all of them, so that
a token's result is the same however its prompt is cut into chunks. Where the model is bf16, prompts
go through ``kernels/prefill.cpp``, as matrix products; there, too, a token's result is the same in
any chunk, and generated tokens attend on their own, also when they are computed again. In fp16
tokens of short rows attend on their own, and for longer ones the kernel does the norms, RoPE and
the write to the cache, and torch the attention.

Shape legend: see ``reference/attention.py``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sortserve.model.attention import HeadNorms, RopeTables, SlabAttention
from sortserve.model.backends.cpu.library import DTYPE_CODES, NativeLibrary, pointer
from sortserve.model.backends.reference.attention import attend_chunk
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["MAX_QUERIES_PER_ROW", "NativeAttention", "Step"]

MAX_QUERIES_PER_ROW = 8
"""Rows with more tokens in a step than this attend as a chunk where torch does that."""

_POINTER_BYTES = 8


class Step(ctypes.Structure):
    """Step of ``kernels/kernels.h``: one slab of one step."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("positions", "slots", "cos", "sin", "block_tables"),
                *("query_tokens", "query_rows", "query_parts", "chunks"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("num_tokens", "num_queries", "num_chunks", "table_stride"),
                *("num_heads", "num_kv_heads", "head_dim", "block_size"),
                *("dtype", "num_threads"),
            )
        ),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
    )


class _AttentionCall(ctypes.Structure):
    """AttentionCall of ``kernels/kernels.h``."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("qkv", "keys", "values", "q_norm", "k_norm", "out")
    )


class _Rows:
    """The rows alive in some slabs of a step, split into queries and chunks.

    Args:
        batch: the step.
        num_rows: the first rows of it are alive.
        partition: cached tokens that one unit of attention work covers.
        num_together: how many tokens of a row, its first ones, attend as a chunk.
    """

    def __init__(
        self,
        batch: Batch,
        num_rows: int,
        partition: int,
        num_together: Callable[[Batch, int], int],
    ) -> None:
        self.batch = batch
        self.num_tokens = batch.query_starts[num_rows]
        self.chunks: list[tuple[int, int, int]] = []
        tokens: list[int] = []
        rows: list[int] = []
        parts = [0]
        for row in range(num_rows):
            start, end = batch.query_starts[row], batch.query_starts[row + 1]
            alone = start + num_together(batch, row)
            if alone > start:
                self.chunks.append((row, start, alone))
            for token in range(alone, end):
                tokens.append(token)
                rows.append(row)
                num_cached = batch.context_lens[row] - (end - 1 - token)
                parts.append(parts[-1] + math.ceil(num_cached / partition))
        self.num_queries = len(tokens)
        # One tensor for all the lists: the kernel gets addresses inside it.
        flat = [index for chunk in self.chunks for index in chunk]
        self.indices = torch.tensor([*tokens, *rows, *parts, *flat])


class NativeAttention:
    """The C++ kernels; CPU tensors of ``dtype``: float32, bfloat16 or float16."""

    def __init__(
        self, config: ModelConfig, rope: RopeTables, library: NativeLibrary, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.rope = rope
        self.library = library
        self.dtype = dtype
        self.has_chunk_kernel = dtype == torch.bfloat16
        """Whether chunks go through a kernel, too."""

    def prepare(self, batch: Batch, slabs: range, num_rows: int) -> Sequence[SlabAttention]:
        """See Attention."""
        rows = self._rows(batch, num_rows)
        return [_NativeSlab(self, rows, slab) for slab in slabs]

    def steps(
        self, batch: Batch, slabs: range, num_rows: int, block_size: int
    ) -> tuple[ctypes.Array[Step], Any]:
        """The kernel's view of some slabs, and what must stay alive while it is used."""
        rows = self._rows(batch, num_rows)
        template = self.step(rows, slabs.start, block_size)
        steps = (Step * len(slabs))()
        for step, slab in zip(steps, slabs, strict=True):
            ctypes.pointer(step)[0] = template
            step.slots, step.block_tables = _slab_addresses(batch, slab)
        return steps, rows

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
        assert kv_TX.dtype == self.dtype
        nobody = self._rows(batch, 0)
        step = self.step(nobody, slab, layer_pages.shape[3])
        step.num_tokens, step.num_heads = batch.query_starts[num_rows], 0
        call = _AttentionCall(
            qkv=pointer(kv_TX),
            keys=pointer(layer_pages[0]),
            values=pointer(layer_pages[1]),
            k_norm=pointer(key_norm),
        )
        self.library.call("attention", step, call)

    def _rows(self, batch: Batch, num_rows: int) -> _Rows:
        return _Rows(batch, num_rows, self.library.attention_partition, self._num_together)

    def _num_together(self, batch: Batch, row: int) -> int:
        if self.dtype == torch.float32:
            return 0
        if self.has_chunk_kernel and batch.num_prompt_tokens is not None:
            return batch.num_prompt_tokens[row]
        num_tokens = batch.query_starts[row + 1] - batch.query_starts[row]
        return num_tokens if num_tokens > MAX_QUERIES_PER_ROW else 0

    def step(self, rows: _Rows, slab: int, block_size: int) -> Step:
        """The kernel's view of one slab; ``rows`` must stay alive while it is used."""
        config, batch, num_queries = self.config, rows.batch, rows.num_queries
        assert batch.positions_T.dtype == batch.slots_ST.dtype == torch.int64
        assert batch.block_tables_SRB.dtype == torch.int32
        indices = rows.indices.data_ptr()
        slots, tables = _slab_addresses(batch, slab)
        return Step(
            positions=pointer(batch.positions_T),
            slots=slots,
            cos=pointer(self.rope.cos),
            sin=pointer(self.rope.sin),
            block_tables=tables,
            query_tokens=indices,
            query_rows=indices + _POINTER_BYTES * num_queries,
            query_parts=indices + _POINTER_BYTES * 2 * num_queries,
            chunks=indices + _POINTER_BYTES * (3 * num_queries + 1),
            num_tokens=rows.num_tokens,
            num_queries=num_queries,
            num_chunks=len(rows.chunks) if self.has_chunk_kernel else 0,
            table_stride=batch.block_tables_SRB.shape[2],
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            dtype=DTYPE_CODES[self.dtype],
            num_threads=torch.get_num_threads(),
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
        )


def _slab_addresses(batch: Batch, slab: int) -> tuple[int, int]:
    """Where a slab's slots and block tables begin."""
    slots, tables = batch.slots_ST, batch.block_tables_SRB
    assert slots.is_contiguous()
    assert tables.is_contiguous()
    return (
        slots.data_ptr() + slab * slots.stride(0) * slots.itemsize,
        tables.data_ptr() + slab * tables.stride(0) * tables.itemsize,
    )


class _NativeSlab:
    """One slab, layer by layer."""

    def __init__(self, attention: NativeAttention, rows: _Rows, slab: int) -> None:
        self._attention = attention
        self._rows = rows
        self._slab = slab

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """See SlabAttention; queries and keys in ``qkv_TX`` are normed and rotated in place."""
        attention = self._attention
        assert qkv_TX.dtype == attention.dtype
        out_TX = qkv_TX.new_empty(self._rows.num_tokens, attention.config.q_size)
        keys, values = layer_pages
        call = _AttentionCall(
            pointer(qkv_TX),
            pointer(keys),
            pointer(values),
            pointer(norms.query if norms else None),
            pointer(norms.key if norms else None),
            pointer(out_TX),
        )
        step = attention.step(self._rows, self._slab, layer_pages.shape[3])
        attention.library.call("attention", step, call)
        if not attention.has_chunk_kernel:
            self._attend_chunks(qkv_TX, layer_pages, out_TX)
        return out_TX

    def _attend_chunks(self, qkv_TX: Tensor, layer_pages: Tensor, out_TX: Tensor) -> None:
        config, batch = self._attention.config, self._rows.batch
        heads = (self._rows.num_tokens, -1, config.head_dim)
        q_TNH = qkv_TX[:, : config.q_size].view(heads)
        out_TNH = out_TX.view(heads)
        for row, start, end in self._rows.chunks:
            table_B = batch.block_tables_SRB[self._slab, row]
            out_TNH[start:end] = attend_chunk(
                q_TNH[start:end], table_B, batch.context_lens[row], layer_pages
            )
