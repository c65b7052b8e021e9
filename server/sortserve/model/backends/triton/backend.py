"""Our Triton kernels for attention and the small operations; matrix products are torch's."""

from __future__ import annotations

from sortserve.model.attention import Attention, RopeTables
from sortserve.model.backend import Ops, Target
from sortserve.model.backends.reference.backend import ReferenceBackend
from sortserve.model.backends.triton.attention import TritonAttention
from sortserve.model.backends.triton.ops import TritonOps
from sortserve.model.backends.triton.tiles import Tiles

__all__ = ["TritonBackend"]


class TritonBackend(ReferenceBackend):
    """CUDA, or a CPU in Triton's interpreter. See ``Backend`` for all methods.

    Args:
        target: what is computed, and where.
        tiles: how the kernels cut their work.
        detail: of the device.
    """

    name = "triton"
    supports_graphs = True
    """Whether launches may be recorded and replayed, on other contents of the same tensors."""

    def __init__(self, target: Target, tiles: Tiles, detail: str) -> None:
        super().__init__(target)
        self.tiles = tiles
        self.detail = detail
        self.ops: Ops = TritonOps(tiles.rows)

    def attention(self, rope: RopeTables) -> Attention:
        """Reads pages in place."""
        return TritonAttention(self.target.config, rope, self.tiles)
