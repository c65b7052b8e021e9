"""The runner executes plans: it owns the weights and the KV, and knows nothing of queues."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.greedy_tail import GreedyTail
from sortserve.engine.inputs import host_batch, upload_batch
from sortserve.engine.prompt_scores import record_prompts, scored_tokens
from sortserve.engine.sampling.bitmask import MaskMaker
from sortserve.engine.sampling.edits import is_plain
from sortserve.engine.sampling.sampler import Sampler
from sortserve.engine.sampling.samples import KnownSamples, Samples
from sortserve.engine.threads import StepThreads
from sortserve.engine.transfers import upload
from sortserve.model.decoder import Decoder
from sortserve.model.graphs import MAX_ROWS, GraphMaker, SegmentGraphs
from sortserve.model.host_batch import HostBatch

__all__ = ["ModelRunner"]

logger = logging.getLogger(__name__)


class _Launched(NamedTuple):
    """A plan that a device may still be running."""

    samples: Samples

    def result(self) -> list[SampledToken | RowFailure]:
        """See ``Pending``."""
        return self.samples.results()


class ModelRunner:
    """Plan in, sampled tokens out.

    Args:
        decoder: runs the layers.
        num_pages: of the KV cache.
        block_size: tokens of a page.
        sampler: chooses the tokens; default: one that asks the decoder's backend.
        graph_maker: records decode steps; None: they run as they are.
        max_num_seqs: rows of the largest step that is worth recording.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_pages: int,
        block_size: int,
        sampler: Sampler | None = None,
        graph_maker: GraphMaker | None = None,
        max_num_seqs: int = MAX_ROWS,
    ) -> None:
        self.num_pages = num_pages
        self.block_size = block_size
        self.slabs = decoder.slabs
        self._decoder = decoder
        self._sampler = sampler or Sampler(decoder.backend.sampling)
        self._graphs: SegmentGraphs | None = None
        self._tail: GreedyTail | None = None
        if graph_maker is None:
            self._kv_cache = decoder.allocate_kv_cache(num_pages, block_size)
        else:  # one page more, that no sequence has
            self._kv_cache = decoder.allocate_kv_cache(num_pages + 1, block_size)
            self._graphs = SegmentGraphs(
                *(decoder, self._kv_cache, graph_maker),
                scratch_page=num_pages,
                max_rows=max_num_seqs,
            )
            self._tail = GreedyTail(decoder, graph_maker, self._graphs.buckets)
        self._threads: StepThreads | None = None
        self._masks = MaskMaker()
        # What the last plan sampled, for rows of the next one that go on from there.
        self._last_ids_R = torch.empty(0, dtype=torch.int64)

    @property
    def num_graphs(self) -> int:
        """Graphs that are recorded; 0: steps run as they are."""
        graphs, tail = self._graphs, self._tail
        if graphs is None or tail is None or not graphs.is_recorded:
            return 0
        return graphs.num_graphs + tail.num_graphs

    def adapt_threads(self, threads: StepThreads) -> None:
        """From now on, let steps use as many threads as ``threads`` finds best."""
        if self._decoder.device.type == "cpu":
            self._threads = threads

    def record_graphs(self) -> None:
        """Record decode steps, if that is wanted, so that none of them has to wait for it.

        On the thread that runs steps. Where it cannot be done (a format of weights whose product
        looks at its inputs, too little memory), steps run as they are, and the log says so.
        """
        if self._graphs is None or self._tail is None or self._graphs.is_recorded:
            return
        started_s = time.monotonic()
        try:
            self._tail.record()
            self._graphs.record()
        except RuntimeError as error:
            logger.warning("decode steps run without CUDA graphs: %s", str(error).split("\n")[0])
            self._graphs = None
        else:
            seconds = time.monotonic() - started_s
            logger.info("%d CUDA graphs recorded in %.1f s", self._graphs.num_graphs, seconds)

    def execute(self, plan: StepPlan) -> list[SampledToken | RowFailure]:
        """Run the plan's rows; for each that samples, in the plan's order, its token or failure."""
        if self._threads is None:
            return self._execute(plan)
        return self._threads.run(plan, self._execute)

    def _execute(self, plan: StepPlan) -> list[SampledToken | RowFailure]:
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> _Launched:
        """See ``Launcher``: the device goes on while the host plans the next step."""
        last_ids_R = self._last_ids_R
        self._last_ids_R = last_ids_R[:0]  # if this plan fails, nobody goes on from it
        sampling = [
            row.sampling.at(row.num_output_tokens) for row in plan.rows if row.sampling is not None
        ]
        masks = self._masks.start(sampling, self._decoder.config.vocab_size)
        host = host_batch(plan, block_size=self.block_size, num_slabs=self._decoder.num_slabs)
        graphs = self._graphs_for(plan, host)
        if graphs is None:
            h_RD = self._forward(plan, host, last_ids_R)
        else:
            inputs = upload(graphs.inputs(host), self._decoder.device)
            h_RD = graphs.forward(host, inputs, last_ids_R)
        if not sampling:
            return _Launched(KnownSamples([]))
        exit_layers = [row.exit_layer for row in plan.rows if row.sampling is not None]
        samples: Samples
        if graphs is not None and self._tail is not None and all(map(is_plain, sampling)):
            samples = self._tail.start(h_RD, exit_layers)
        else:
            logits_RV = self._decoder.logits(h_RD, exit_layers)
            made = {} if masks is None else masks.result()
            samples = self._sampler.start(logits_RV, sampling, made)
        self._last_ids_R = samples.token_ids_R
        return _Launched(samples)

    def _graphs_for(self, plan: StepPlan, host: HostBatch) -> SegmentGraphs | None:
        """What replays the step; None if it has to run as it is."""
        if self._graphs is None or not self._graphs.can_run(host):
            return None
        # What is recorded of a step is its rows' last tokens alone.
        if any(row.prompt_logprobs is not None for row in plan.rows):
            return None
        self.record_graphs()
        return self._graphs

    def _forward(self, plan: StepPlan, host: HostBatch, last_ids_R: Tensor) -> Tensor:
        device = self._decoder.device
        scored = scored_tokens(plan, device)
        batch = replace(upload_batch(host, device, last_ids_R), scored=scored)
        h_RD = self._decoder.forward(batch, self._kv_cache)
        if scored is not None:
            record_prompts(plan, scored, self._decoder.logits)
        return h_RD
