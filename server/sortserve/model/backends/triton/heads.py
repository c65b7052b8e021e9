"""What comes between the QKV projection and attention, in one launch.

Shape legend: T tokens, N query heads, K key/value heads, H head_dim, X = (N + 2K) * H.
"""

from __future__ import annotations

from torch import Tensor

from sortserve.model.attention import HeadNorms, RopeTables
from sortserve.model.backends.triton.kernels.heads import rotate_and_write_kernel
from sortserve.model.backends.triton.tiles import Tiles, next_power_of_two
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["TritonHeads"]


class TritonHeads:
    """Norms and rotates the heads of one slab's rows, and writes keys and values.

    Args:
        config: sizes of the heads.
        rope: cosines and sines by position.
        tiles: how the work is cut.
        batch: the step.
        slab: of the layers that it is called for.
    """

    def __init__(
        self, config: ModelConfig, rope: RopeTables, tiles: Tiles, batch: Batch, slab: int
    ) -> None:
        self._config = config
        self._rope = rope
        self._tiles = tiles
        self._batch = batch
        self._slab = slab

    def __call__(self, qkv_TX: Tensor, norms: HeadNorms | None, layer_pages: Tensor) -> Tensor:
        """The queries, a view [T, N, H] of ``qkv_TX``; the rest goes to ``layer_pages``.

        Args:
            qkv_TX: contiguous, of the first tokens of the batch. Its queries change in place.
            norms: None: there are none.
            layer_pages: of the layer.
        """
        assert qkv_TX.is_contiguous()
        assert layer_pages.is_contiguous()
        config, rope, batch = self._config, self._rope, self._batch
        num_tokens = qkv_TX.shape[0]
        num_heads = config.num_heads + 2 * config.num_kv_heads
        rotate_and_write_kernel[(-(-num_tokens * num_heads // self._tiles.heads),)](
            qkv_TX,
            layer_pages,
            layer_pages.stride(0),
            norms.query if norms else None,
            norms.key if norms else None,
            rope.cos,
            rope.sin,
            batch.positions_T,
            batch.slots_ST,
            batch.slots_ST.stride(0),
            self._slab,
            num_tokens,
            config.rms_norm_eps,
            HAS_NORMS=norms is not None,
            NUM_HEADS=config.num_heads,
            NUM_KV_HEADS=config.num_kv_heads,
            HEAD_DIM=config.head_dim,
            PADDED_HALF=next_power_of_two(config.head_dim // 2),
            BLOCK_SIZE=layer_pages.shape[3],
            HEADS=self._tiles.heads,
        )
        return qkv_TX[:, : config.q_size].view(num_tokens, config.num_heads, config.head_dim)
