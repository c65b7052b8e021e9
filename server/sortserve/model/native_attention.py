"""Attention on the CPU by the C++ kernel, which reads pages in place.

Rows with few tokens (decode above all) go through the kernel. The longer chunks of a prefill are
matrix products; for them the kernel does the norms, RoPE and the write to the cache, and torch the
attention, over gathered pages.

Shape legend: see ``sortserve.model.attention``.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from sortserve.model.attention import HeadNorms, RopeTables, SlabAttention, attend_chunk
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig
from sortserve.model.native import DTYPE_CODES, NativeLibrary, pointer

__all__ = ["MAX_KERNEL_TOKENS", "NativeAttention"]

MAX_KERNEL_TOKENS = 8
"""Rows with more tokens in a step than this are left to torch's attention."""


class _Step(ctypes.Structure):
    """Step of ``kernels/attention.cpp``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("positions", "slots", "cos", "sin", "block_tables"),
                *("query_tokens", "query_rows", "query_tasks", "partials"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("num_tokens", "num_queries", "table_stride"),
                *("num_heads", "num_kv_heads", "head_dim", "block_size"),
                *("dtype", "num_threads"),
            )
        ),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
    )


class _LayerCall(ctypes.Structure):
    """LayerCall of ``kernels/attention.cpp``."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("qkv", "keys", "values", "q_norm", "k_norm", "out")
    )


class NativeAttention:
    """The C++ kernel; CPU tensors of float32, bfloat16 or float16 only."""

    name = "native"

    def __init__(self, config: ModelConfig, rope: RopeTables, library: NativeLibrary) -> None:
        self.config = config
        self.rope = rope
        self.library = library

    def prepare(self, batch: Batch, slab: int, num_rows: int) -> SlabAttention:
        """See AttentionBackend."""
        return _NativeSlab(self, batch, slab, num_rows)


class _NativeSlab:
    """The rows alive in one slab, as the kernel wants to see them."""

    def __init__(self, backend: NativeAttention, batch: Batch, slab: int, num_rows: int) -> None:
        self._config = backend.config
        self._library = backend.library
        self._num_tokens = batch.query_starts[num_rows]
        self._tables_RB = batch.block_tables_SRB[slab, :num_rows].contiguous()
        self._chunks: list[tuple[int, slice, int]] = []
        tokens: list[int] = []
        rows: list[int] = []
        tasks = [0]
        partition = backend.library.attention_partition
        for row in range(num_rows):
            start, end = batch.query_starts[row], batch.query_starts[row + 1]
            context_len = batch.context_lens[row]
            if end - start > MAX_KERNEL_TOKENS:
                self._chunks.append((row, slice(start, end), context_len))
                continue
            for token in range(start, end):
                tokens.append(token)
                rows.append(row)
                num_cached = context_len - (end - 1 - token)
                tasks.append(tasks[-1] + math.ceil(num_cached / partition))
        self._queries = torch.tensor([*tokens, *rows, *tasks])
        self._step = self._make_step(backend.rope, batch, slab, len(tokens), tasks[-1])

    def _make_step(
        self, rope: RopeTables, batch: Batch, slab: int, num_queries: int, num_tasks: int
    ) -> _Step:
        config = self._config
        # The kernel gets bare addresses: keep what they point to alive.
        self._slots_T = batch.slots_ST[slab].contiguous()
        self._positions_T = batch.positions_T.contiguous()
        self._rope = rope
        split = num_tasks > num_queries
        width = -(-config.head_dim // 16) * 16 + 16
        self._partials = torch.empty(num_tasks * config.num_heads * width if split else 0)
        queries = self._queries.data_ptr()
        return _Step(
            positions=pointer(self._positions_T),
            slots=pointer(self._slots_T),
            cos=pointer(rope.cos),
            sin=pointer(rope.sin),
            block_tables=pointer(self._tables_RB),
            query_tokens=queries,
            query_rows=queries + 8 * num_queries,
            query_tasks=queries + 16 * num_queries,
            partials=pointer(self._partials),
            num_tokens=self._num_tokens,
            num_queries=num_queries,
            table_stride=self._tables_RB.shape[1],
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_threads=torch.get_num_threads(),
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
        )

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """See SlabAttention; queries and keys in ``qkv_TX`` are normed and rotated in place."""
        out_TX = qkv_TX.new_empty(self._num_tokens, self._config.q_size)
        keys, values = layer_pages
        self._step.block_size = layer_pages.shape[3]
        self._step.dtype = DTYPE_CODES[qkv_TX.dtype]
        call = _LayerCall(
            pointer(qkv_TX),
            pointer(keys),
            pointer(values),
            pointer(norms.query if norms else None),
            pointer(norms.key if norms else None),
            pointer(out_TX),
        )
        self._library.call("attention", self._step, call)
        if self._chunks:
            self._attend_chunks(qkv_TX, layer_pages, out_TX)
        return out_TX

    def _attend_chunks(self, qkv_TX: Tensor, layer_pages: Tensor, out_TX: Tensor) -> None:
        heads = (self._num_tokens, -1, self._config.head_dim)
        q_TNH = qkv_TX[:, : self._config.q_size].view(heads)
        out_TNH = out_TX.view(heads)
        for row, tokens, context_len in self._chunks:
            out_TNH[tokens] = attend_chunk(
                q_TNH[tokens], self._tables_RB[row], context_len, layer_pages
            )
