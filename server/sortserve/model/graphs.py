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
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.model.attention import KVCache
from sortserve.model.batch import Batch
from sortserve.model.decoder import Decoder
from sortserve.model.host_batch import HostBatch

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
        self._inputs = _Inputs(
            *(decoder, kv_cache.block_size, scratch_page),
            max_rows=self.buckets[-1],
            max_last_rows=max_rows,
        )
        self._graphs: dict[tuple[int, int], Graph] = {}
        embedded, _ = decoder.embed(self._inputs.token_ids_R)
        self._h_RD, self._delta_RD = torch.zeros_like(embedded), torch.zeros_like(embedded)

    def can_run(self, host: HostBatch) -> bool:
        """Whether it is a decode step, and small enough."""
        return host.is_decode and host.num_rows <= self.buckets[-1]

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

    def inputs(self, host: HostBatch) -> list[NDArray[Any]]:
        """What to upload for a batch that ``can_run``: it is padded on the host."""
        return self._inputs.arrays(host, self.bucket(host.num_rows))

    @torch.inference_mode()
    def forward(
        self, host: HostBatch, inputs: Sequence[Tensor], last_ids_R: Tensor | None = None
    ) -> Tensor:
        """See ``Decoder.forward``; all is recorded.

        Args:
            host: one that ``can_run``.
            inputs: what ``inputs`` gave for it, on the device.
            last_ids_R: on that device, what the step before sampled: int64.
        """
        assert self.is_recorded
        if host.taken:
            assert last_ids_R is not None
            assert max(n for _, n in host.taken) < len(last_ids_R), "it has not been sampled"
        self._inputs.load(inputs, last_ids_R if host.taken else None)
        batch = self._inputs.batch_of(host)
        left: list[Tensor] = []
        for index, layers in enumerate(self._segments):
            num_rows = batch.num_rows_deeper_than(layers.start)
            if not num_rows:
                break
            self._graphs[index, self.bucket(num_rows)].replay()
            # Who leaves here is read before the next segment takes its place for padding.
            h_RD, delta_RD = self._h_RD[:num_rows], self._delta_RD[:num_rows]
            left.append(self._decoder.leave(batch, layers.stop, h_RD, delta_RD, self._kv_cache))
        return torch.cat(left[::-1])

    def bucket(self, num_rows: int) -> int:
        """So many rows are run for ``num_rows``."""
        return self.buckets[bisect_left(self.buckets, num_rows)]

    def _segment(self, index: int, layers: range, num_rows: int) -> Callable[[], None]:
        """What runs a segment from and to the same addresses."""
        batch = self._inputs.batch(index, layers, num_rows, self._max_len)
        h_out_RD, delta_out_RD = self._h_RD[:num_rows], self._delta_RD[:num_rows]

        def run() -> None:
            h_RD, delta_RD = h_out_RD, delta_out_RD
            if layers.start == 0:
                h_RD, delta_RD = self._decoder.embed(self._inputs.known_ids(num_rows))
            h_RD, delta_RD = self._decoder.run_layers(batch, layers, h_RD, delta_RD, self._kv_cache)
            for out_RD, result_RD in ((h_out_RD, h_RD), (delta_out_RD, delta_RD)):
                if result_RD is not out_RD:
                    out_RD.copy_(result_RD)

        return run


class _Inputs:
    """The tensors that all graphs read, for as many rows as there may be."""

    def __init__(
        self,
        decoder: Decoder,
        block_size: int,
        scratch_page: int,
        *,
        max_rows: int,
        max_last_rows: int,
    ) -> None:
        device, num_slabs = decoder.device, decoder.num_slabs
        num_blocks = math.ceil(decoder.max_model_len / block_size)
        self._scratch_page = scratch_page
        self._rows_R = torch.arange(max_rows, device=device)
        self._starts_R1 = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._scratch_slots_R = scratch_page * block_size + self._rows_R % block_size
        self._first_slabs_G = [decoder.slabs.place(start)[0] for start in (0, *decoder.exits[:-1])]
        self._block_size = block_size
        # One array, one copy a step: token ids, places in _last_ids_R (-1: the id is known),
        # positions, and the slots of each slab.
        self._ints_XR = torch.zeros(3 + num_slabs, max_rows, dtype=torch.int64, device=device)
        self.token_ids_R, self._taken_R, self._positions_R = self._ints_XR[:3]
        self._slots_SR = self._ints_XR[3:]
        # The step before may have been too large for graphs.
        self._last_ids_R = torch.zeros(max_last_rows, dtype=torch.int64, device=device)
        self._tables_SRB = torch.full(
            (num_slabs, max_rows, num_blocks), scratch_page, dtype=torch.int32, device=device
        )
        num_segments = len(self._first_slabs_G)
        self._lens_GR = torch.ones(num_segments, max_rows, dtype=torch.int32, device=device)

    def clear(self) -> None:
        """Let all rows be padding."""
        self._taken_R.fill_(-1)
        self._slots_SR.copy_(self._scratch_slots_R.expand_as(self._slots_SR))
        self._tables_SRB[:, :, 0] = self._scratch_page
        self._lens_GR.fill_(1)

    def arrays(self, host: HostBatch, num_rows: int) -> list[NDArray[Any]]:
        """A batch padded to ``num_rows``: what ``load`` takes, once it is on the device."""
        tables_SRB, slots_SR = host.block_tables_SRB, host.slots_ST
        num_slabs, num_known = slots_SR.shape
        rows = slice(num_known)
        ints_XR = np.zeros((3 + num_slabs, num_rows), dtype=np.int64)
        ints_XR[0, rows], ints_XR[2, rows] = host.token_ids_T, host.positions_T
        ints_XR[1] = -1
        for r, place in host.taken:
            ints_XR[1, r] = place
        first = self._scratch_page * self._block_size
        ints_XR[3:] = first + np.arange(num_rows) % self._block_size
        np.copyto(ints_XR[3:, rows], slots_SR, where=slots_SR >= 0)

        tables = np.full((num_slabs, num_rows, tables_SRB.shape[2]), self._scratch_page, np.int32)
        np.copyto(tables[:, rows], tables_SRB, where=tables_SRB >= 0)

        lens_GR = np.ones((len(self._first_slabs_G), num_rows), dtype=np.int32)
        is_alive_GR = tables_SRB[self._first_slabs_G, :, 0] >= 0
        lens_R = np.array(host.context_lens, dtype=np.int32)
        np.copyto(lens_GR[:, rows], lens_R[None], where=is_alive_GR)
        return [ints_XR, tables, lens_GR]

    def load(self, inputs: Sequence[Tensor], last_ids_R: Tensor | None) -> None:
        """Take over what ``arrays`` has made."""
        ints_XR, tables_SRB, lens_GR = inputs
        rows = slice(ints_XR.shape[1])
        self._ints_XR[:, rows].copy_(ints_XR)
        # Columns past those of the batch keep what they have: nobody looks past a row's length.
        self._tables_SRB[:, rows, : tables_SRB.shape[2]].copy_(tables_SRB)
        self._lens_GR[:, rows].copy_(lens_GR)
        if last_ids_R is not None:
            self._last_ids_R[: len(last_ids_R)].copy_(last_ids_R)

    def known_ids(self, num_rows: int) -> Tensor:
        """The token ids of the first rows, with those that the step before has sampled."""
        taken_R = self._taken_R[:num_rows]
        last_R = self._last_ids_R.index_select(0, taken_R.clamp(min=0))
        return torch.where(taken_R >= 0, last_R, self.token_ids_R[:num_rows])

    def batch_of(self, host: HostBatch) -> Batch:
        """What has been loaded as its rows know it, when they leave."""
        num_rows = host.num_rows
        return Batch(
            token_ids_T=self.token_ids_R[:num_rows],
            positions_T=self._positions_R[:num_rows],
            query_starts=host.query_starts,
            context_lens=host.context_lens,
            exit_layers=host.exit_layers,
            samples=host.samples,
            query_starts_R1=self._starts_R1[: num_rows + 1],
            context_lens_R=self._lens_GR[0, :num_rows],
            block_tables_SRB=self._tables_SRB,
            slots_ST=self._slots_SR,
            num_prompt_tokens=host.num_prompt_tokens,
            last_tokens_N=self._rows_R[:num_rows],
            single_rows_N=self._rows_R[:num_rows],
            is_recorded=True,
        )

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
