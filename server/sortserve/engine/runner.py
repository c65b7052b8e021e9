"""The runner executes plans: it owns the weights and the KV, and knows nothing of queues."""

from __future__ import annotations

import torch

from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.inputs import build_batch
from sortserve.engine.sampling.bitmask import MaskMaker
from sortserve.engine.sampling.sampler import Sampler
from sortserve.engine.threads import StepThreads
from sortserve.model.decoder import Decoder

__all__ = ["ModelRunner"]


class ModelRunner:
    """Plan in, sampled tokens out."""

    def __init__(
        self, decoder: Decoder, *, num_pages: int, block_size: int, sampler: Sampler | None = None
    ) -> None:
        self.num_pages = num_pages
        self.block_size = block_size
        self.slab_size = decoder.slab_size
        self._decoder = decoder
        self._sampler = sampler or Sampler(decoder.backend.sampling)
        self._kv_cache = decoder.allocate_kv_cache(num_pages, block_size)
        self._threads: StepThreads | None = None
        self._masks = MaskMaker()

    def adapt_threads(self, threads: StepThreads) -> None:
        """From now on, let steps use as many threads as ``threads`` finds best."""
        if self._decoder.device.type == "cpu":
            self._threads = threads

    def execute(self, plan: StepPlan) -> list[SampledToken | RowFailure]:
        """Run the plan's rows; for each that samples, in the plan's order, its token or failure."""
        if self._threads is None:
            return self._execute(plan)
        return self._threads.run(plan, self._execute)

    @torch.inference_mode()
    def _execute(self, plan: StepPlan) -> list[SampledToken | RowFailure]:
        batch = build_batch(
            plan,
            block_size=self.block_size,
            num_slabs=self._decoder.num_slabs,
            device=self._decoder.device,
        )
        sampling = [row.sampling for row in plan.rows if row.sampling is not None]
        masks = self._masks.start(sampling, self._decoder.config.vocab_size)
        h_RD = self._decoder.forward(batch, self._kv_cache)
        if not sampling:
            return []
        logits_RV = self._decoder.logits(h_RD)
        return self._sampler.sample(logits_RV, sampling, {} if masks is None else masks.result())
