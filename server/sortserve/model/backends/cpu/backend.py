"""Our C++ kernels: bf16, fp32 and int8 on any CPU that a compiler or a prebuilt library serves.

Linear layers stream their weights at memory bandwidth for few tokens, and a token's result does not
depend on the tokens beside it (``benchmarks/kernels.py`` measures). What has no kernel (products in
fp16, formats of weights that are not ours) is left to the format's own definition in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sortserve.model.attention import RopeTables
from sortserve.model.backend import Embedding, LayerStack, Ops, Target, Unusable
from sortserve.model.backends.cpu.arena import Arena
from sortserve.model.backends.cpu.attention import NativeAttention
from sortserve.model.backends.cpu.library import DTYPE_CODES, NativeLibrary, load_native
from sortserve.model.backends.cpu.linear import NativeLinear, Output, PackedLinear
from sortserve.model.backends.cpu.linear_int8 import NativeInt8Linear
from sortserve.model.backends.cpu.ops import NativeOps
from sortserve.model.backends.cpu.sampling import NativeSampling
from sortserve.model.backends.cpu.stack import NativeStack, can_fuse
from sortserve.model.backends.reference.backend import ReferenceBackend
from sortserve.model.layers import StepwiseStack, pack_layer
from sortserve.model.weight import LinearOp, Weight
from sortserve.model.weights import LayerWeights

__all__ = ["CpuBackend", "make_cpu_backend"]


class CpuBackend(ReferenceBackend):
    """The C++ kernels where they can be used. See ``Backend`` for all methods."""

    name = "cpu"

    def __init__(self, target: Target, library: NativeLibrary) -> None:
        super().__init__(target)
        self.ops: Ops = NativeOps(library)
        self.sampling = NativeSampling(library)
        self.library = library
        self._arena = Arena()
        self.detail = library.isa

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> LinearOp:
        """In one call, bias and rounding included."""
        packed = self._pack(weight, bias_O, Output.of(self.target.dtype))
        return packed or super().linear(weight, bias_O)

    def gated(self, weight: Weight, bias_2F: Tensor | None = None) -> LinearOp:
        """In one call, the gate included."""
        return self._pack(weight, bias_2F, Output.SILU_MUL) or super().gated(weight, bias_2F)

    def head(self, weight: Weight) -> LinearOp:
        """In one call, its sums as they are."""
        return self._pack(weight, None, Output.FP32) or super().head(weight)

    def tied_embedding(self, head: LinearOp) -> Embedding | None:
        """Rows of the packed matrix, so that it is in memory once."""
        return head.rows if isinstance(head, NativeLinear) else None

    def _pack(self, weight: Weight, bias_O: Tensor | None, output: Output) -> PackedLinear | None:
        """None: there is no kernel for it."""
        for kind in (NativeLinear, NativeInt8Linear):
            if kind.can_pack(weight, self.target.dtype):
                return kind(self.library, self._arena, weight, bias_O, output, self.target.dtype)
        return None

    def attention(self, rope: RopeTables) -> NativeAttention:
        """Reads pages in place."""
        return NativeAttention(self.target.config, rope, self.library, self.target.dtype)

    def stack(
        self, layers: Sequence[LayerWeights], rope: RopeTables, *, release_weights: bool
    ) -> LayerStack:
        """All layers of a segment in one call where all matrices are packed for it."""
        packed = [pack_layer(self, layer, release_weights=release_weights) for layer in layers]
        attention = self.attention(rope)
        if can_fuse(packed):
            return NativeStack(packed, attention)
        return StepwiseStack(packed, attention, self.ops, self.target.config.rms_norm_eps)


def make_cpu_backend(target: Target) -> CpuBackend | Unusable:
    """The kernels, where there are any for this CPU."""
    if target.device.type != "cpu":
        return Unusable("its kernels are for CPUs")
    if target.dtype not in DTYPE_CODES:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
        return Unusable(f"its dtypes are {', '.join(names)}")
    library = load_native()
    if library is None:
        return Unusable("there is no compiler and no prebuilt library")
    return CpuBackend(target, library)
