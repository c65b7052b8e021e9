"""The own layer of an exit: one more decoder layer, whose keys and values are of deeper rows, too.

Whatever passes the exit leaves its keys and values there, and so a row that leaves finds those of
all its tokens, however deep it was when they were read. The rest (queries, attention, output, MLP)
is for tokens that are asked for, each as a row of one token whatever its prompt's chunks were.

Shape legend: T tokens, N tokens that are asked for, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sortserve.model.attention import Attention, HeadNorms, KVCache
from sortserve.model.backend import Backend
from sortserve.model.batch import Batch
from sortserve.model.scored import AskedTokens
from sortserve.model.weight import Weight
from sortserve.model.weights import OwnLayerWeights

__all__ = ["OwnLayer"]


class OwnLayer:
    """The own layer of one exit.

    Args:
        weights: on one device, in one dtype.
        backend: what to compute with.
        attention: of the backend, shared by all own layers.
        eps: of the norms.
        exit_layer: the exit.
        release_weights: drop each matrix of ``weights`` once its packed copy exists.
    """

    def __init__(
        self,
        weights: OwnLayerWeights,
        backend: Backend,
        attention: Attention,
        eps: float,
        *,
        exit_layer: int,
        release_weights: bool,
    ) -> None:
        self._ops = backend.ops
        self._attention = attention
        self._eps = eps
        self._exit_layer = exit_layer
        self._input_norm = weights.input_norm
        self._q = backend.linear(weights.q, weights.q_bias)
        self._kv = backend.linear(weights.kv, weights.kv_bias)
        self._head_norms: HeadNorms | None = None
        if weights.q_norm is not None and weights.k_norm is not None:
            self._head_norms = HeadNorms(weights.q_norm, weights.k_norm)
        self._o = backend.summed(backend.linear(weights.o, weights.o_bias))
        self._post_attention_norm = weights.post_attention_norm
        self._gated = backend.gated(weights.gate_up, weights.gate_up_bias)
        self._down = backend.summed(backend.linear(weights.down, weights.down_bias))
        self._kv_size = weights.kv.shape[0]
        if release_weights:
            weights.q = weights.kv = weights.o = weights.gate_up = weights.down = Weight.nothing()

    def write(
        self, batch: Batch, num_rows: int, h_TD: Tensor, delta_TD: Tensor, kv_cache: KVCache
    ) -> None:
        """Write keys and values of all tokens that come to the exit.

        Args:
            batch: the step.
            num_rows: the first rows of it have come here.
            h_TD: as in ``LayerStack``, of their tokens; stays as it is.
            delta_TD: the same.
            kv_cache: where to.
        """
        slab, plane = kv_cache.slabs.own_place(self._exit_layer)
        x_TD = self._ops.rms_norm(h_TD + delta_TD, self._input_norm, self._eps)
        key_norm = None if self._head_norms is None else self._head_norms.key
        self._attention.write(
            batch, slab, num_rows, self._kv(x_TD), key_norm, kv_cache.pages[plane]
        )

    def run(self, batch: Batch, asked: AskedTokens, h_ND: Tensor, kv_cache: KVCache) -> Tensor:
        """The residual stream after the layer, [N, D].

        Args:
            batch: the step; all its tokens up to these have been written.
            asked: the tokens, at least one.
            h_ND: their residual stream before the layer; may be overwritten.
            kv_cache: of the step.
        """
        slab, plane = kv_cache.slabs.own_place(self._exit_layer)
        single = _single_rows(batch, asked, self._exit_layer, slab)
        [attend] = self._attention.prepare(single, range(slab, slab + 1), len(h_ND))
        x_ND = self._ops.rms_norm(h_ND, self._input_norm, self._eps)
        q_NX = self._q(x_ND)
        # The place of keys and values, which are in the cache already.
        qkv_NX = torch.nn.functional.pad(q_NX, (0, self._kv_size))
        delta_ND = self._o(attend(qkv_NX, self._head_norms, kv_cache.pages[plane]))
        x_ND = self._ops.add_rms_norm(h_ND, delta_ND, self._post_attention_norm, self._eps)
        return h_ND + self._down(self._gated(x_ND))


def _single_rows(batch: Batch, asked: AskedTokens, exit_layer: int, slab: int) -> Batch:
    """A batch in which each of these tokens is a row, with pages in one slab and none to write."""
    num_rows, tokens_N = len(asked.context_lens), asked.tokens_N
    # From what is on the device already: nothing is sent there in the middle of a step.
    starts = torch.arange(num_rows + 1, device=tokens_N.device)
    rows_N = torch.searchsorted(batch.query_starts_R1[1:], tokens_N.int(), right=True)
    positions_N = batch.positions_T[tokens_N]
    num_slabs, _, num_blocks = batch.block_tables_SRB.shape
    tables_SRB = batch.block_tables_SRB.new_empty(num_slabs, num_rows, num_blocks)
    tables_SRB[slab] = batch.block_tables_SRB[slab, rows_N]
    return Batch(
        token_ids_T=batch.token_ids_T[tokens_N],
        positions_T=positions_N,
        query_starts=tuple(range(num_rows + 1)),
        context_lens=tuple(asked.context_lens),
        exit_layers=(exit_layer,) * num_rows,
        samples=(True,) * num_rows,
        query_starts_R1=starts.int(),
        context_lens_R=(positions_N + 1).int(),
        block_tables_SRB=tables_SRB,
        slots_ST=batch.slots_ST.new_full((num_slabs, num_rows), -1),
        num_prompt_tokens=(0,) * num_rows,
        last_tokens_N=starts[:-1],
        single_rows_N=starts[:-1],
        writes=False,
    )
