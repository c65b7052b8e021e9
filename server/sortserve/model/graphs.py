"""Decode steps as recorded graphs: what to launch is decided once, and then only run again.

With few rows a GPU is done with an operation before the host has launched the next. A recorded
graph is launched as a whole, but always with the same sizes and addresses. Depth does not get in
the way: a step is segments over prefixes of its rows, so a graph for each segment and some numbers
of rows (``row_buckets``) runs every mix of depths. Prompts run as they are, without graphs.

Rows up to the next bucket are padding: they read and write a scratch page that no sequence has. So
are the rows that have left already, in the segments above their exit.

Shape legend: R rows, one token each, S slabs, G segments, B blocks of the longest sequence there
may be, D hidden.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sortserve.model.attention import KVCache
from sortserve.model.batch import Batch
from sortserve.model.decoder import Decoder

__all__ = [
    "MAX_ROWS",
    "CudaGraphMaker",
    "Graph",
    "GraphMaker",
    "SegmentGraphs",
    "make_graph_maker",
    "row_buckets",
]

MAX_ROWS = 512
"""Steps of more rows keep a GPU busy without graphs."""


class Graph(Protocol):
    """Recorded launches."""

    def replay(self) -> None:
        """Launch them again, on what their inputs hold by now."""


class GraphMaker(Protocol):
    """Records graphs that share the memory they compute in.

    What a graph has computed there is gone once another one is replayed: results that are to last
    are copied to tensors that were there before.
    """

    def record(self, run: Callable[[], object]) -> Graph:
        """Record what ``run`` launches. It is called more than once."""
        ...


class CudaGraphMaker:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], object]) -> Graph:
        """See GraphMaker. The first call compiles and allocates what is made on first use."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device: only this one must not wait for it.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()
        return graph


def make_graph_maker(decoder: Decoder) -> GraphMaker | None:
    """What records the decoder's steps; None: they cannot be recorded, or it would not pay."""
    if decoder.device.type != "cuda" or not decoder.backend.supports_graphs:
        return None
    return CudaGraphMaker(decoder.device)


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that are recorded, ascending: no more than half of a step is padding.

    Few rows take as long as one, so small buckets are powers of two; from 8 on there is one between
    each two of these.
    """
    sizes = [1, 2, 4] + [size for i in range(3, 30) for size in (2**i, 3 * 2 ** (i - 1))]
    return (*(size for size in sizes if size < max_rows), max_rows)


class SegmentGraphs:
    """Runs decode steps by replaying graphs.

    Args:
        decoder: its backend ``supports_graphs``.
        kv_cache: of the steps; it has one page more than sequences may have.
        maker: records.
        scratch_page: that page.
        max_rows: of a step.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        maker: GraphMaker,
        *,
        scratch_page: int,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._maker = maker
        self._scratch_page = scratch_page
        self._max_len = decoder.max_model_len
        self.buckets = row_buckets(min(max_rows, MAX_ROWS))
        starts = (0, *decoder.exits[:-1])
        self._segments = [range(a, b) for a, b in zip(starts, decoder.exits, strict=True)]
        self._inputs = _Inputs(decoder, kv_cache.block_size, scratch_page, self.buckets[-1])
        self._graphs: dict[tuple[int, int], Graph] = {}
        embedded, _ = decoder.embed(self._inputs.token_ids_R)
        self._h_RD, self._delta_RD = torch.zeros_like(embedded), torch.zeros_like(embedded)

    def can_run(self, batch: Batch) -> bool:
        """Whether it is a decode step, and small enough."""
        return batch.is_decode and batch.num_rows <= self.buckets[-1]

    @property
    def num_graphs(self) -> int:
        """How many there are when all are recorded."""
        return len(self.buckets) * len(self._segments)

    @property
    def is_recorded(self) -> bool:
        """Whether they are."""
        return len(self._graphs) == self.num_graphs

    @torch.inference_mode()
    def record(self) -> None:
        """Record all graphs, on the thread that will replay them.

        Raises:
            RuntimeError: something in them cannot be recorded, or memory is short.
        """
        self._inputs.clear()
        for num_rows in reversed(self.buckets):  # smaller ones fit into the memory of the largest
            for index, layers in enumerate(self._segments):
                run = self._segment(index, layers, num_rows)
                self._graphs[index, num_rows] = self._maker.record(run)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """See ``Decoder.forward``; the batch is one that ``can_run``, and all is recorded."""
        assert self.can_run(batch)
        assert self.is_recorded
        self._inputs.load(batch, self._bucket(batch.num_rows))
        left: list[Tensor] = []
        for index, layers in enumerate(self._segments):
            num_rows = batch.num_rows_deeper_than(layers.start)
            if not num_rows:
                break
            self._graphs[index, self._bucket(num_rows)].replay()
            # Who leaves here is read before the next segment takes its place for padding.
            h_RD, delta_RD = self._h_RD[:num_rows], self._delta_RD[:num_rows]
            left.append(self._decoder.leave(batch, layers.stop, h_RD, delta_RD))
        return torch.cat(left[::-1])

    def _bucket(self, num_rows: int) -> int:
        return self.buckets[bisect_left(self.buckets, num_rows)]

    def _segment(self, index: int, layers: range, num_rows: int) -> Callable[[], None]:
        """What runs a segment from and to the same addresses."""
        batch = self._inputs.batch(index, layers, num_rows, self._max_len)
        h_out_RD, delta_out_RD = self._h_RD[:num_rows], self._delta_RD[:num_rows]

        def run() -> None:
            h_RD, delta_RD = h_out_RD, delta_out_RD
            if layers.start == 0:
                h_RD, delta_RD = self._decoder.embed(batch.token_ids_T)
            h_RD, delta_RD = self._decoder.run_layers(batch, layers, h_RD, delta_RD, self._kv_cache)
            for out_RD, result_RD in ((h_out_RD, h_RD), (delta_out_RD, delta_RD)):
                if result_RD is not out_RD:
                    out_RD.copy_(result_RD)

        return run


class _Inputs:
    """The tensors that all graphs read, for as many rows as there may be."""

    def __init__(self, decoder: Decoder, block_size: int, scratch_page: int, max_rows: int) -> None:
        device, num_slabs = decoder.device, decoder.num_slabs
        num_blocks = math.ceil(decoder.max_model_len / block_size)
        self._scratch_page = scratch_page
        self._rows_R = torch.arange(max_rows, device=device)
        self._starts_R1 = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._scratch_slots_R = scratch_page * block_size + self._rows_R % block_size
        first_slabs = [start // decoder.slab_size for start in (0, *decoder.exits[:-1])]
        self._first_slabs_G = torch.tensor(first_slabs, device=device)
        self.token_ids_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions_R = torch.zeros_like(self.token_ids_R)
        self._slots_SR = self._scratch_slots_R.repeat(num_slabs, 1)
        self._tables_SRB = torch.full(
            (num_slabs, max_rows, num_blocks), scratch_page, dtype=torch.int32, device=device
        )
        self._lens_GR = torch.ones(len(first_slabs), max_rows, dtype=torch.int32, device=device)

    def clear(self) -> None:
        """Let all rows be padding."""
        self._pad(slice(None))

    def load(self, batch: Batch, num_rows: int) -> None:
        """Take over a batch, and let it be padded to ``num_rows``."""
        rows = slice(batch.num_rows)
        self.token_ids_R[rows].copy_(batch.token_ids_T)
        self._positions_R[rows].copy_(batch.positions_T)
        tables_SRB, slots_SR = batch.block_tables_SRB, batch.slots_ST
        # Columns past those of the batch keep what they have: nobody looks past a row's length.
        self._tables_SRB[:, rows, : tables_SRB.shape[2]].copy_(
            torch.where(tables_SRB < 0, self._scratch_page, tables_SRB)
        )
        self._slots_SR[:, rows].copy_(
            torch.where(slots_SR < 0, self._scratch_slots_R[rows], slots_SR)
        )
        is_alive_GR = tables_SRB[:, :, 0].index_select(0, self._first_slabs_G) >= 0
        self._lens_GR[:, rows].copy_(torch.where(is_alive_GR, batch.context_lens_R, 1))
        if batch.num_rows < num_rows:
            self._pad(slice(batch.num_rows, num_rows))

    def _pad(self, rows: slice) -> None:
        self._tables_SRB[:, rows, 0] = self._scratch_page
        self._slots_SR[:, rows] = self._scratch_slots_R[rows]
        self._lens_GR[:, rows] = 1

    def batch(self, index: int, layers: range, num_rows: int, max_len: int) -> Batch:
        """The first rows as a segment sees them; tables and slots of all rows lie as they are."""
        return Batch(
            token_ids_T=self.token_ids_R[:num_rows],
            positions_T=self._positions_R[:num_rows],
            query_starts=tuple(range(num_rows + 1)),
            context_lens=(max_len,) * num_rows,
            exit_layers=(layers.stop,) * num_rows,
            samples=(True,) * num_rows,
            query_starts_R1=self._starts_R1[: num_rows + 1],
            context_lens_R=self._lens_GR[index, :num_rows],
            block_tables_SRB=self._tables_SRB,
            slots_ST=self._slots_SR,
            num_prompt_tokens=(0,) * num_rows,
            last_tokens_N=self._rows_R[:num_rows],
            single_rows_N=self._rows_R[:num_rows],
            is_recorded=True,
        )
