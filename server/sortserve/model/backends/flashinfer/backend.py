"""FlashInfer's attention; all else by our Triton kernels, or by torch where there is no Triton."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from sortserve.model.attention import Attention, RopeTables
from sortserve.model.backend import Backend, Target, Unusable
from sortserve.model.backends.flashinfer.attention import FlashInferAttention, Heads, MakeHeads
from sortserve.model.backends.reference.backend import ReferenceBackend
from sortserve.model.backends.reference.heads import ReferenceHeads
from sortserve.model.backends.triton.choice import make_triton_backend
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig

__all__ = ["FlashInferBackend", "make_flashinfer_backend"]

_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)


class FlashInferBackend(ReferenceBackend):
    """See ``Backend`` for all methods.

    Args:
        target: what is computed, and where.
        module: the package ``flashinfer``.
    """

    name = "flashinfer"

    def __init__(self, target: Target, module: Any) -> None:
        super().__init__(target)
        self._module = module
        self._make_heads: MakeHeads = ReferenceHeads
        self.detail = f"{module.__version__}, with torch"
        triton = make_triton_backend(target)
        if not isinstance(triton, Unusable):
            self.ops = triton.ops
            self._make_heads = _triton_heads(triton)
            self.detail = f"{module.__version__}, with triton {triton.detail}"

    def attention(self, rope: RopeTables) -> Attention:
        """One plan a slab and step."""
        return FlashInferAttention(self.target.config, rope, self._module, self._make_heads)


def make_flashinfer_backend(target: Target) -> Backend | Unusable:
    """FlashInfer, where it is installed and has kernels."""
    if target.device.type != "cuda":
        return Unusable("its kernels are for CUDA devices")
    if target.dtype not in _DTYPES:
        return Unusable("its dtypes are float16 and bfloat16")
    if target.config.head_dim not in _HEAD_DIMS:
        return Unusable(
            f"head_dim={target.config.head_dim} is none of {', '.join(map(str, _HEAD_DIMS))}"
        )
    if importlib.util.find_spec("flashinfer") is None:
        return Unusable("FlashInfer is not installed: pip install 'sortserve[flashinfer]'")
    return FlashInferBackend(target, importlib.import_module("flashinfer"))


def _triton_heads(backend: Backend) -> MakeHeads:
    from sortserve.model.backends.triton.backend import TritonBackend
    from sortserve.model.backends.triton.heads import TritonHeads

    assert isinstance(backend, TritonBackend)
    tiles = backend.tiles

    def make(
        config: ModelConfig, rope: RopeTables, batch: Batch, slab: int, num_rows: int
    ) -> Heads:
        return TritonHeads(config, rope, tiles, batch, slab)

    return make
