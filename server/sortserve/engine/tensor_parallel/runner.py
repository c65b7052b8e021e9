"""The runner of rank 0: a plan in, run by all ranks, sampled tokens out."""

from __future__ import annotations

from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.runner import ModelRunner
from sortserve.engine.tensor_parallel.ranks import Ranks
from sortserve.engine.threads import StepThreads
from sortserve.model.decoder import Decoder

__all__ = ["TensorParallelRunner"]


class TensorParallelRunner(ModelRunner):
    """A ModelRunner whose decoder has a share of the model, and whose ranks have the others.

    Args:
        decoder: of rank 0.
        num_pages: on each rank.
        block_size: tokens of a page.
        ranks: that have started.
    """

    def __init__(self, decoder: Decoder, *, num_pages: int, block_size: int, ranks: Ranks) -> None:
        super().__init__(decoder, num_pages=num_pages, block_size=block_size)
        self._ranks = ranks

    def adapt_threads(self, threads: StepThreads) -> None:
        """Nothing: a step takes as long as its slowest rank, whatever this one does."""

    def execute(self, plan: StepPlan) -> list[SampledToken | RowFailure]:
        """See ModelRunner.

        Raises:
            RunnerLost: a rank is gone.
        """
        return self._ranks.run(plan, super().execute)
