"""The runner executes plans: it owns the weights and the KV, and knows nothing of queues."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.inputs import build_batch
from sortserve.engine.sampling.bitmask import MaskMaker
from sortserve.engine.sampling.sampler import Sampler
from sortserve.engine.threads import StepThreads
from sortserve.model.decoder import Decoder

__all__ = ["ModelRunner"]


class _Launched(NamedTuple):
    """A plan whose results are there."""

    results: list[SampledToken | RowFailure]

    def result(self) -> list[SampledToken | RowFailure]:
        """See ``Pending``."""
        return self.results


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
        # What the last plan sampled, for rows of the next one that go on from there.
        self._last_ids_R = torch.empty(0, dtype=torch.int64)

    def adapt_threads(self, threads: StepThreads) -> None:
        """From now on, let steps use as many threads as ``threads`` finds best."""
        if self._decoder.device.type == "cpu":
            self._threads = threads

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
        h_RD = self._decoder.forward(batch, self._kv_cache)
        if not sampling:
            return _Launched([])
        logits_RV = self._decoder.logits(h_RD)
        made = {} if masks is None else masks.result()
        results = self._sampler.sample(logits_RV, sampling, made)
        ids = [r.token_id if isinstance(r, SampledToken) else 0 for r in results]
        self._last_ids_R = torch.tensor(ids, device=self._decoder.device)
        return _Launched(results)
