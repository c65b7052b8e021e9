"""The decoder: any number of rows, each to its own depth, over one paged KV cache.

The tokens of all rows lie one after another, without padding, rows deepest first. So the rows that
are alive in a segment are a prefix of the batch, and a row leaves by a slice.

Shape legend: T tokens, R rows that sample, D hidden, V vocabulary, F intermediate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from sortserve.core.slabs import Slabs
from sortserve.model.attention import KVCache, RopeTables
from sortserve.model.backend import Backend, Embedding
from sortserve.model.backends import choose_backend
from sortserve.model.batch import Batch
from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import SharedNorm
from sortserve.model.local_shape import LocalShape
from sortserve.model.own_layer import OwnLayer
from sortserve.model.scored import AskedTokens
from sortserve.model.weight import LinearOp, Weight
from sortserve.model.weights import ExitModuleWeights, ModelWeights

__all__ = ["Decoder"]


class Decoder:
    """Runs batches through the first layers of a model.

    Args:
        config: sizes of the model.
        weights: on one device, in one dtype.
        exits: depths that rows may ask for, ascending.
        max_model_len: positions that rows may have, in tokens.
        backend: what to compute with; default: what is fastest here.
        shape: the share that the weights are, and that the backend computes; None: everything.
        release_weights: drop each matrix of ``weights`` as soon as its packed copy exists, so that
            the model is not in memory twice; ``weights`` is of no use afterwards.

    Attributes:
        config: the whole model.
        local_config: what the backend computes with.
        backend: what it computes with.
        formats: how many of the matrices are in each format of weights, by its name.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        exits: Sequence[int],
        max_model_len: int,
        backend: Backend | None = None,
        shape: LocalShape | None = None,
        release_weights: bool = False,
    ) -> None:
        assert list(exits) == sorted(set(exits))
        assert 0 < exits[0] <= exits[-1] <= config.num_layers
        self.config = config
        self.local_config = config if shape is None else shape.config(config)
        self.device = weights.device
        self.dtype = weights.dtype
        self.formats = weights.formats
        self.max_model_len = max_model_len
        self.exits = tuple(exits)
        modules = {e: weights.exit_modules.get(e, _NO_MODULE) for e in exits}
        self.slabs = Slabs.of(exits, [e for e in exits if modules[e].kind.has_layer])
        self.slab_size = self.slabs.size
        self.num_slabs = self.slabs.count(exits[-1])

        self.backend = backend or choose_backend(config, self.dtype, self.device)
        self._final_norm, self._eps = weights.final_norm, config.rms_norm_eps
        stack = config.num_stack_layers
        # All but the first time that the layers are run: the stream is normed before.
        self._loop_starts = range(stack, config.num_layers, stack)
        rope = RopeTables.build(weights.inv_freq, weights.rope_attention_scaling, max_model_len)
        self._stack = self.backend.stack(
            weights.layers[: exits[-1]], rope, release_weights=release_weights
        )
        self._own_layers = self._pack_own_layers(modules, rope, release_weights=release_weights)
        self._exits = {
            exit_layer: module.kind(module.tensors, weights.final_norm, self.backend, self._eps)
            for exit_layer, module in modules.items()
        }
        if release_weights:
            weights.exit_modules.clear()
        self._lm_head = self.backend.head(weights.lm_head)
        self._embed = self._make_embedding(weights)
        if release_weights:
            weights.embed = weights.embed.new_empty(0, config.hidden_size)
            weights.lm_head = Weight.nothing()
        self._own_heads: dict[int, LinearOp] = {}
        for exit_layer, module in modules.items():
            if module.head is not None:
                self._own_heads[exit_layer] = self.backend.head(module.head)
                if release_weights:
                    module.head = None

    def _make_embedding(self, weights: ModelWeights) -> Embedding:
        is_tied = weights.lm_head.values is weights.embed
        tied = self.backend.tied_embedding(self._lm_head) if is_tied else None
        return tied or partial(embedding, weight=weights.embed)

    def _pack_own_layers(
        self,
        modules: Mapping[int, ExitModuleWeights],
        rope: RopeTables,
        *,
        release_weights: bool,
    ) -> dict[int, OwnLayer]:
        layers = {e: module.layer for e, module in modules.items() if module.layer is not None}
        if not layers:
            return {}
        attention = self.backend.attention(rope)
        return {
            exit_layer: OwnLayer(
                layer,
                self.backend,
                attention,
                self._eps,
                exit_layer=exit_layer,
                release_weights=release_weights,
            )
            for exit_layer, layer in layers.items()
        }

    def allocate_kv_cache(self, num_pages: int, block_size: int) -> KVCache:
        """A pool of ``num_pages`` pages of ``block_size`` tokens on the decoder's device."""
        return self.backend.allocate_kv_cache(self.slabs, num_pages, block_size)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Run every row to its exit and write its keys and values.

        Returns:
            [R, D]: the last token's hidden state of each row that samples, in the order of the
            batch, its exit's module and norm applied.
        """
        assert kv_cache.slabs == self.slabs
        h_TD, delta_TD = self.embed(batch.token_ids_T)
        left: list[Tensor] = []
        depth = 0
        passed = (e for e in self._own_layers if e < batch.exit_layers[0])
        for exit_layer in sorted({*batch.exit_layers, *passed}):
            layers = range(depth, exit_layer)
            h_TD, delta_TD = self.run_layers(batch, layers, h_TD, delta_TD, kv_cache)
            left.append(self.leave(batch, exit_layer, h_TD, delta_TD, kv_cache))
            depth = exit_layer
        # Shallow rows left first; in the batch they come last.
        return torch.cat(left[::-1])

    def embed(self, token_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads: ``h`` and ``delta``, [T, D] both."""
        h_TD = self._embed(token_ids_T)
        return h_TD, torch.zeros_like(h_TD)

    def run_layers(
        self, batch: Batch, layers: range, h_TD: Tensor, delta_TD: Tensor, kv_cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """Run the rows that go deeper than ``layers.start`` from exit to exit, and write what an
        own layer of the last one needs of them.

        Args:
            batch: the step.
            layers: no row leaves between two of them, nor is there an own layer.
            h_TD: as in ``LayerStack``, of these rows or of more; may be overwritten.
            delta_TD: the same.
            kv_cache: new keys and values are written to it.
        """
        num_rows = batch.num_rows_deeper_than(layers.start)
        num_tokens = batch.query_starts[num_rows]
        h_TD, delta_TD = h_TD[:num_tokens], delta_TD[:num_tokens]
        for part in self._by_loop(layers):
            if part.start in self._loop_starts:
                h_TD = self.backend.ops.add_rms_norm(h_TD, delta_TD, self._final_norm, self._eps)
                delta_TD = torch.zeros_like(h_TD)
            h_TD, delta_TD = self._stack.run(batch, part, num_rows, h_TD, delta_TD, kv_cache)
        if layers.stop in self._own_layers:
            self._own_layers[layers.stop].write(batch, num_rows, h_TD, delta_TD, kv_cache)
        return h_TD, delta_TD

    def _by_loop(self, layers: range) -> Iterator[range]:
        """These layers, in parts that are of one time through the model's layers each."""
        inner = [start for start in self._loop_starts if layers.start < start < layers.stop]
        for start, end in itertools.pairwise([layers.start, *inner, layers.stop]):
            yield range(start, end)

    def leave(
        self, batch: Batch, exit_layer: int, h_TD: Tensor, delta_TD: Tensor, kv_cache: KVCache
    ) -> Tensor:
        """[rows that sample at this exit, D], through the exit's module."""

        def through_module(asked: AskedTokens, h_ND: Tensor) -> Tensor:
            if exit_layer in self._own_layers:
                h_ND = self._own_layers[exit_layer].run(batch, asked, h_ND, kv_cache)
            return self._exits[exit_layer](h_ND)

        def hidden(asked: AskedTokens) -> Tensor:
            return through_module(asked, h_TD[asked.tokens_N] + delta_TD[asked.tokens_N])

        if batch.scored is not None:
            batch.scored.leave(exit_layer, hidden)
        first, end = (batch.num_rows_deeper_than(layer) for layer in (exit_layer, exit_layer - 1))
        rows = [row for row in range(first, end) if batch.samples[row]]
        if not rows:
            return h_TD[:0]
        start = sum(batch.samples[:first])
        last_N = batch.last_tokens_N[start : start + len(rows)]
        asked = AskedTokens(last_N, [batch.context_lens[row] for row in rows])
        begin, stop = batch.query_starts[first], batch.query_starts[end]
        if stop - begin == len(rows):  # one token each, and all sample: they lie side by side
            return through_module(asked, h_TD[begin:stop] + delta_TD[begin:stop])
        return hidden(asked)

    @property
    def heads(self) -> tuple[int | None, ...]:
        """The heads there are: None is the model's, a number the own one of an exit."""
        return (None, *self._own_heads)

    def runs_of_heads(self, exit_layers: Iterable[int]) -> list[tuple[int | None, int]]:
        """Which heads rows that leave at these exits pass: one of ``heads``, and how many rows in
        a row pass it.
        """
        own = (e if e in self._own_heads else None for e in exit_layers)
        return [(head, len(list(rows))) for head, rows in itertools.groupby(own)]

    @torch.inference_mode()
    def logits(self, h_RD: Tensor, exit_layers: Sequence[int] | None = None) -> Tensor:
        """[R, D] to fp32 [R, V].

        Args:
            h_RD: as ``forward`` gives it.
            exit_layers: R, at which they left; None: there is one head.
        """
        if not self._own_heads:
            return self._lm_head(h_RD)
        assert exit_layers is not None
        assert len(exit_layers) == len(h_RD)
        runs = self.runs_of_heads(exit_layers)
        if len(runs) <= 1:
            return self.apply_head(runs[0][0] if runs else None, h_RD)
        parts = torch.split(h_RD, [num_rows for _, num_rows in runs])
        return torch.cat(
            [self.apply_head(head, part) for (head, _), part in zip(runs, parts, strict=True)]
        )

    def apply_head(self, head: int | None, h_RD: Tensor) -> Tensor:
        """[R, D] to fp32 [R, V], through one of ``heads``."""
        return self._lm_head(h_RD) if head is None else self._own_heads[head](h_RD)


_NO_MODULE = ExitModuleWeights(kind=SharedNorm, tensors={})
