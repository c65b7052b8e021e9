"""What comes between the QKV projection and attention, in plain torch: the definition.

Shape legend: T tokens, N query heads, K key/value heads, H head_dim, X = (N + 2K) * H.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sortserve.model.attention import HeadNorms, RopeTables
from sortserve.model.backends.reference.ops import ReferenceOps
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["ReferenceHeads"]


class ReferenceHeads:
    """Norms and rotates the heads of the rows alive in one slab, and writes keys and values.

    Args:
        config: sizes of the heads.
        rope: cosines and sines by position.
        batch: the step.
        slab: of the layers that it is called for.
        num_rows: the first rows of the batch are alive.
    """

    def __init__(
        self, config: ModelConfig, rope: RopeTables, batch: Batch, slab: int, num_rows: int
    ) -> None:
        self._config = config
        num_tokens = batch.query_starts[num_rows]
        positions_T = batch.positions_T[:num_tokens]
        self._cos_T1H = rope.cos[positions_T][:, None]
        self._sin_T1H = rope.sin[positions_T][:, None]
        self._slots_T = batch.slots_ST[slab, :num_tokens] if batch.writes else None

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """The queries, [T, N, H]; the rest goes to ``layer_pages``, keys normed and rotated."""
        q_TNH, k_TKH, v_TKH = self._split(qkv_TX)
        if norms is not None:
            q_TNH = self._norm(q_TNH, norms.query)
            k_TKH = self._norm(k_TKH, norms.key)
        if self._slots_T is not None:
            self._write(layer_pages, self._slots_T, self._rotate(k_TKH), v_TKH)
        return self._rotate(q_TNH)

    def _split(self, qkv_TX: Tensor) -> tuple[Tensor, ...]:
        config = self._config
        heads_TXH = qkv_TX.view(qkv_TX.shape[0], -1, config.head_dim)
        num_heads, num_keys = config.num_heads, config.num_kv_heads
        bounds = (0, num_heads, num_heads + num_keys, num_heads + 2 * num_keys)
        return tuple(heads_TXH[:, a:b] for a, b in itertools.pairwise(bounds))

    def _norm(self, x_TNH: Tensor, weight_H: Tensor) -> Tensor:
        return ReferenceOps().rms_norm(x_TNH, weight_H, self._config.rms_norm_eps)

    def _rotate(self, x_TNH: Tensor) -> Tensor:
        first, second = x_TNH.float().chunk(2, dim=-1)
        cos, sin = self._cos_T1H, self._sin_T1H
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x_TNH.dtype)

    def _write(self, layer_pages: Tensor, slots_T: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        block_size = layer_pages.shape[3]
        pages_T, offsets_T = slots_T // block_size, slots_T % block_size
        layer_pages[0][pages_T, :, offsets_T] = k_TKH
        layer_pages[1][pages_T, :, offsets_T] = v_TKH
