"""The interface of a backend: what a decoder computes with.

A backend has the small operations, packs the matrices of linear layers and multiplies by them, runs
layers, and keeps keys and values. ``sortserve.model.backends`` has those there are and chooses one
of them, once (``--backend``); a decoder is handed the ``Backend`` and asks for no names.

Shape legend: T tokens, D hidden, I inputs, O outputs, F intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.sampling_params import SamplingParams
from sortserve.core.slabs import Slabs
from sortserve.model.attention import Attention, KVCache, RopeTables
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig
from sortserve.model.weight import LinearOp, Weight
from sortserve.model.weights import LayerWeights

__all__ = ["Backend", "Embedding", "LayerStack", "Ops", "RowSampling", "Target", "Unusable"]


class Ops(Protocol):
    """The small operations of a decoder layer.

    Norms compute in fp32 and round once, to the dtype of the input.
    """

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``x / rms(x) * weight`` over the last dimension."""
        ...

    def add_rms_norm(self, h_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``h += delta`` in place, then the norm of h."""
        ...

    def silu_and_mul(self, gate_up_TF: Tensor) -> Tensor:
        """``silu(gate) * up`` of the two halves: [T, 2F] to [T, F]."""
        ...


class Embedding(Protocol):
    """Rows of the matrix of an embedding."""

    def __call__(self, token_ids_T: Tensor, /) -> Tensor:
        """The rows of these tokens, [T, D] in the dtype of the matrix."""
        ...


class LayerStack(Protocol):
    """Runs layers."""

    def run(
        self,
        batch: Batch,
        layers: range,
        num_rows: int,
        h_TD: Tensor,
        delta_TD: Tensor,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Tensor]:
        """The new ``h`` and ``delta``; the old ones may be overwritten.

        Args:
            batch: the step.
            layers: to run, in order; the first of them is the first of its slab. Of a model that
                runs its layers several times they are of one of these times, and layer l has the
                weights of layer ``l % n``, n the number of layers that the stack was made of.
            num_rows: the first rows of the batch, all alive in these layers; T are their tokens.
            h_TD: the residual stream, without its last addition.
            delta_TD: that addition.
            kv_cache: new keys and values are written to it.
        """
        ...


class RowSampling(Protocol):
    """Fast ways to what ``engine.sampling`` defines, for some rows of a batch.

    Shapes: R rows of the batch, N those that are meant, V vocabulary, K blocks of it (K divides V,
    and a block is a power of two of tokens, at most 64), W words of 32 tokens. Logits and maxima
    are contiguous float32. Only ``apply_bitmasks`` writes to the logits.
    """

    def block_maxima(self, logits_RV: Tensor, num_blocks: int) -> Tensor:
        """The largest logit of each block [R, K]; NaN where there is one."""
        ...

    def apply_bitmasks(
        self, logits_RV: Tensor, maxima_RK: Tensor, masks: Mapping[int, NDArray[np.int32]]
    ) -> None:
        """Set the logits of tokens whose bit is clear to -inf, and the maxima accordingly.

        Args:
            logits_RV: none of them a NaN.
            maxima_RK: of the logits as they are.
            masks: of some rows, W words each; token t is bit ``t % 32`` of word ``t // 32``.
        """
        ...

    def draw_tokens(
        self,
        logits_RV: Tensor,
        maxima_RK: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        filters: Sequence[SamplingParams],
        noise: Sequence[float],
    ) -> list[int | None]:
        """The token that each of the rows draws; None: not known, to be found the plain way.

        Args:
            logits_RV: contiguous float32, edited.
            maxima_RK: the largest logits of a row's blocks; the largest of all is finite.
            rows: which of them.
            temperatures: of each, above 0 in float32.
            filters: the top_k, top_p and min_p of each.
            noise: of each, in [0, 1).
        """
        ...

    def log_sums(self, logits_RV: Tensor, maxima_RK: Tensor, rows: Sequence[int]) -> Tensor:
        """``log(sum(exp(logits - largest)))`` of the rows, float32 [N]."""
        ...


class Backend(Protocol):
    """What a decoder computes with, made for one ``Target``."""

    name: str
    """What ``--backend`` calls it."""
    detail: str
    """What it chose for this machine, for the log; may be empty."""
    ops: Ops
    sampling: RowSampling | None
    """None: there is nothing faster than the plain way."""
    supports_graphs: bool
    """Whether its stack may be recorded for steps in which every row has one token, and run again
    on other contents of the same tensors (``Batch.is_recorded``, ``sortserve.model.graphs``). It
    may then launch nothing that depends on a value of a tensor, nor make tensors of host values;
    sizes of launches may depend on the number of rows, and on upper bounds: ``context_lens`` of the
    batch and the width of ``block_tables_SRB``. Rows that are no more than padding read and write
    pages as any other row. It pays only if time goes with ``context_lens_R``, not with the
    bounds."""

    def linear(self, weight: Weight, bias_O: Tensor | None = None) -> LinearOp:
        """``x W^T + b`` in the dtype of x."""
        ...

    def gated(self, weight: Weight, bias_2F: Tensor | None = None) -> LinearOp:
        """``silu(gate) * up``: the weights are all gates, then all ups; [T, I] to [T, F]."""
        ...

    def summed(self, linear: LinearOp) -> LinearOp:
        """A product whose inputs are divided among ranks, if there are several: the whole of it."""
        ...

    def head(self, weight: Weight) -> LinearOp:
        """``x W^T`` in fp32."""
        ...

    def tied_embedding(self, head: LinearOp) -> Embedding | None:
        """The embedding whose matrix is that of a plain ``head``, read where the head keeps it.

        None: the head reads the matrix itself, or has no exact copy of it.
        """
        ...

    def attention(self, rope: RopeTables) -> Attention:
        """Attention over pages, for the positions that ``rope`` has."""
        ...

    def stack(
        self, layers: Sequence[LayerWeights], rope: RopeTables, *, release_weights: bool
    ) -> LayerStack:
        """All layers of a model, their matrices packed.

        Args:
            layers: from the first on.
            rope: positions that rows may have.
            release_weights: drop each matrix of ``layers`` once its packed copy exists.
        """
        ...

    def allocate_kv_cache(self, slabs: Slabs, num_pages: int, block_size: int) -> KVCache:
        """A pool of ``num_pages`` pages: ``block_size`` tokens of one slab each."""
        ...


@dataclass(frozen=True)
class Target:
    """What is to be computed and where: the choice of a backend depends on nothing else."""

    config: ModelConfig
    """The model; of one of several ranks, the narrower one that is its share (``LocalShape``)."""
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Unusable:
    """What is given for a backend that cannot compute a target on this machine."""

    reason: str
    """The end of a sentence about the backend."""
