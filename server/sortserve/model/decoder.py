"""The decoder: any number of rows, each to its own depth, over one paged KV cache.

The tokens of all rows lie one after another, without padding, rows deepest first. So the rows that
are alive in a segment are a prefix of the batch, and a row leaves by a slice.

Shape legend: T tokens, R rows that sample, D hidden, V vocabulary, F intermediate.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sortserve.core.errors import ConfigError
from sortserve.model.attention import (
    AttentionBackend,
    KVCache,
    ReferenceAttention,
    RopeTables,
)
from sortserve.model.backends.cpu.attention import NativeAttention
from sortserve.model.backends.cpu.library import DTYPE_CODES, NativeLibrary, load_native
from sortserve.model.backends.cpu.stack import NativeStack
from sortserve.model.batch import Batch
from sortserve.model.config import ExitModuleKind, ModelConfig
from sortserve.model.layers import DecoderLayer, LayerStack, LayerTools, StepwiseStack
from sortserve.model.linear import choose_linear_backend
from sortserve.model.ops import NativeOps, TorchOps
from sortserve.model.weights import ExitModuleWeights, ModelWeights

__all__ = ["Decoder"]


class Decoder:
    """Runs batches through the first layers of a model.

    Args:
        config: sizes of the model.
        weights: on one device, in one dtype.
        exits: depths that rows may ask for, ascending.
        max_model_len: positions that rows may have, in tokens.
        attention_backend: "auto", "reference" or "native" (C++ on the CPU); for norms, too.
        linear_backend: one of ``sortserve.model.linear.LINEAR_BACKENDS``.
        release_weights: drop each matrix of ``weights`` as soon as its packed copy exists, so that
            the model is not in memory twice; ``weights`` is of no use afterwards.

    Attributes:
        attention: the backend in use.
        linear: the backend in use.

    Raises:
        ConfigError: a backend asked for by name does not work here.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        exits: Sequence[int],
        max_model_len: int,
        attention_backend: str = "auto",
        linear_backend: str = "auto",
        release_weights: bool = False,
    ) -> None:
        assert list(exits) == sorted(set(exits))
        assert 0 < exits[0] <= exits[-1] <= config.num_layers
        self.config = config
        self.device = weights.embed.device
        self.dtype = weights.dtype
        self.max_model_len = max_model_len
        self.exits = tuple(exits)
        self.slab_size = math.gcd(*exits)
        self.num_slabs = exits[-1] // self.slab_size

        library = _choose_native(attention_backend, self.dtype, self.device)
        rope = RopeTables.build(weights.inv_freq, weights.rope_attention_scaling, max_model_len)
        self.attention: AttentionBackend = ReferenceAttention(config, rope)
        ops = TorchOps()
        if library is not None:
            self.attention = NativeAttention(config, rope, library, self.dtype)
            ops = NativeOps(library)
        self.linear = choose_linear_backend(
            linear_backend,
            dtype=self.dtype,
            device=self.device,
            num_weight_bytes=_num_linear_elements(config) * self.dtype.itemsize,
            ops=ops,
        )
        self._embed = weights.embed
        tools = LayerTools(config.rms_norm_eps, ops, self.linear)
        layers = [
            DecoderLayer(tools, layer, release_weights) for layer in weights.layers[: exits[-1]]
        ]
        self._stack: LayerStack = StepwiseStack(layers, self.attention)
        self._fused_stack: LayerStack = self._stack
        if isinstance(self.attention, NativeAttention) and NativeStack.supports(layers):
            self._fused_stack = NativeStack(layers, self.attention)
        self._exits = {
            exit_layer: _ExitModule(
                tools, weights.exit_modules.get(exit_layer, _NO_MODULE), weights.final_norm
            )
            for exit_layer in exits
        }
        self._lm_head = self.linear.head(weights.lm_head)
        if release_weights and weights.lm_head is not weights.embed:
            weights.lm_head = weights.lm_head.new_empty(0)

    def allocate_kv_cache(self, num_pages: int, block_size: int) -> KVCache:
        """A pool of ``num_pages`` pages of ``block_size`` tokens on the decoder's device."""
        return KVCache.allocate(
            self.config, self.slab_size, num_pages, block_size, self.dtype, self.device
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Run every row to its exit and write its keys and values.

        Returns:
            [R, D]: the last token's hidden state of each row that samples, in the order of the
            batch, its exit's module and norm applied.
        """
        assert kv_cache.slab_size == self.slab_size
        h_TD = embedding(batch.token_ids_T, self._embed)
        delta_TD = torch.zeros_like(h_TD)
        left: list[Tensor] = []
        depth = 0
        for exit_layer in sorted(set(batch.exit_layers)):
            num_rows = _num_rows_deeper_than(batch, depth)
            num_tokens = batch.query_starts[num_rows]
            stack = self._fused_stack if num_tokens <= self.linear.max_fused_tokens else self._stack
            h_TD, delta_TD = stack.run(
                batch,
                range(depth // self.slab_size, exit_layer // self.slab_size),
                num_rows,
                h_TD[:num_tokens],
                delta_TD[:num_tokens],
                kv_cache,
            )
            left.append(self._leave(batch, exit_layer, h_TD, delta_TD))
            depth = exit_layer
        # Shallow rows left first; in the batch they come last.
        return torch.cat(left[::-1])

    def _leave(self, batch: Batch, exit_layer: int, h_TD: Tensor, delta_TD: Tensor) -> Tensor:
        """[rows that sample at this exit, D], through the exit's module."""
        rows = range(
            _num_rows_deeper_than(batch, exit_layer), _num_rows_deeper_than(batch, exit_layer - 1)
        )
        last = [batch.query_starts[row + 1] - 1 for row in rows if batch.samples[row]]
        if not last:
            return h_TD[:0]
        last_R = torch.tensor(last, device=self.device)
        return self._exits[exit_layer](h_TD[last_R] + delta_TD[last_R])

    @torch.inference_mode()
    def logits(self, h_RD: Tensor) -> Tensor:
        """[R, D] to fp32 [R, V]."""
        return self._lm_head(h_RD)


def _num_rows_deeper_than(batch: Batch, layer: int) -> int:
    """Rows whose exit is above ``layer``: a prefix, as exits descend."""
    return bisect_left(batch.exit_layers, -layer, key=lambda exit_layer: -exit_layer)


def _choose_native(
    attention_backend: str, dtype: torch.dtype, device: torch.device
) -> NativeLibrary | None:
    """The C++ kernels if they are to be used for attention and norms, else None."""
    if attention_backend == "reference":
        return None
    possible = device.type == "cpu" and dtype in DTYPE_CODES
    library = load_native() if possible and attention_backend in {"auto", "native"} else None
    if library is None and attention_backend != "auto":
        raise ConfigError(
            f"attention_backend {attention_backend!r} cannot be used for {dtype} on {device.type} "
            "on this machine; use 'auto' (backends: auto, reference, native)",
            param="attention_backend",
        )
    return library


def _num_linear_elements(config: ModelConfig) -> int:
    """Elements of all linear weights, head included."""
    attention = (2 * config.q_size + 2 * config.kv_size) * config.hidden_size
    mlp = 3 * config.intermediate_size * config.hidden_size
    return config.num_layers * (attention + mlp) + config.vocab_size * config.hidden_size


_NO_MODULE = ExitModuleWeights(kind=ExitModuleKind.NONE)


class _ExitModule:
    """What stands between the trunk and the shared head at one exit."""

    def __init__(self, tools: LayerTools, weights: ExitModuleWeights, final_norm: Tensor) -> None:
        linear = tools.linear
        self._eps = tools.eps
        self._ops = tools.ops
        self._norm = final_norm if weights.norm is None else weights.norm
        self._affine = None if weights.affine is None else linear.linear(weights.affine)
        self._mlp_norm = weights.mlp_norm
        self._gated = None if weights.gate_up is None else linear.gated(weights.gate_up)
        self._down = None if weights.down is None else linear.linear(weights.down)

    def __call__(self, h_RD: Tensor) -> Tensor:
        """[R, D] to [R, D], ready for the head."""
        if self._affine is not None:
            h_RD = h_RD + self._affine(h_RD)
        if self._mlp_norm is not None and self._gated is not None and self._down is not None:
            x_RD = self._ops.rms_norm(h_RD, self._mlp_norm, self._eps)
            h_RD = h_RD + self._down(self._gated(x_RD))
        return self._ops.rms_norm(h_RD, self._norm, self._eps)
