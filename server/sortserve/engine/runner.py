"""The runner executes plans: it owns the weights and the KV, and knows nothing of queues."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import torch
from torch import Tensor

from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.inputs import build_batch
from sortserve.engine.prompt_scores import record_prompts
from sortserve.engine.sampling.bitmask import MaskMaker
from sortserve.engine.sampling.sampler import Sampler
from sortserve.engine.sampling.samples import KnownSamples, Samples
from sortserve.engine.threads import StepThreads
from sortserve.model.batch import Batch
from sortserve.model.decoder import Decoder
from sortserve.model.graphs import MAX_ROWS, GraphMaker, SegmentGraphs

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
        self.slab_size = decoder.slab_size
        self._decoder = decoder
        self._sampler = sampler or Sampler(decoder.backend.sampling)
        self._graphs: SegmentGraphs | None = None
        if graph_maker is None:
            self._kv_cache = decoder.allocate_kv_cache(num_pages, block_size)
        else:  # one page more, that no sequence has
            self._kv_cache = decoder.allocate_kv_cache(num_pages + 1, block_size)
            self._graphs = SegmentGraphs(
                *(decoder, self._kv_cache, graph_maker),
                scratch_page=num_pages,
                max_rows=max_num_seqs,
            )
        self._threads: StepThreads | None = None
        self._masks = MaskMaker()
        # What the last plan sampled, for rows of the next one that go on from there.
        self._last_ids_R = torch.empty(0, dtype=torch.int64)

    @property
    def num_graphs(self) -> int:
        """Graphs that are recorded; 0: steps run as they are."""
        graphs = self._graphs
        return graphs.num_graphs if graphs is not None and graphs.is_recorded else 0

    def adapt_threads(self, threads: StepThreads) -> None:
        """From now on, let steps use as many threads as ``threads`` finds best."""
        if self._decoder.device.type == "cpu":
            self._threads = threads

    def record_graphs(self) -> None:
        """Record decode steps, if that is wanted, so that none of them has to wait for it.

        On the thread that runs steps. Where it cannot be done (a format of weights whose product
        looks at its inputs, too little memory), steps run as they are, and the log says so.
        """
        if self._graphs is None or self._graphs.is_recorded:
            return
        started_s = time.monotonic()
        try:
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
        batch = build_batch(
            plan,
            block_size=self.block_size,
            num_slabs=self._decoder.num_slabs,
            device=self._decoder.device,
            last_ids_R=self._last_ids_R,
        )
        self._last_ids_R = self._last_ids_R[:0]  # if this plan fails, nobody goes on from it
        sampling = [
            row.sampling.at(row.num_output_tokens) for row in plan.rows if row.sampling is not None
        ]
        masks = self._masks.start(sampling, self._decoder.config.vocab_size)
        h_RD = self._forward(batch)
        if batch.scored is not None:
            record_prompts(plan, batch.scored, self._decoder.logits)
        if not sampling:
            return _Launched(KnownSamples([]))
        logits_RV = self._decoder.logits(h_RD)
        made = {} if masks is None else masks.result()
        samples = self._sampler.start(logits_RV, sampling, made)
        self._last_ids_R = samples.token_ids_R
        return _Launched(samples)

    def _forward(self, batch: Batch) -> Tensor:
        if batch.scored is not None:  # what is recorded of a step is its rows' last tokens alone
            return self._decoder.forward(batch, self._kv_cache)
        if self._graphs is not None and self._graphs.can_run(batch):
            self.record_graphs()
        if self._graphs is not None and self._graphs.can_run(batch):
            return self._graphs.forward(batch)
        return self._decoder.forward(batch, self._kv_cache)
