"""Does the engine still run anything at all? (no torch)"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from sortserve.core.plan import RowPlan, Runner, StepPlan
from sortserve.core.sampling_params import SampledToken, SamplingParams, SamplingRow

__all__ = ["runs_a_token"]

logger = logging.getLogger(__name__)


def runs_a_token(runner: Runner, full_depth: int, pages: Sequence[int]) -> bool:
    """Whether token 0 alone, greedy and through all layers, gives a token.

    Args:
        runner: executes plans.
        full_depth: layers of the full model.
        pages: one page for each slab, to write to.
    """
    sampling = SamplingRow(
        params=SamplingParams(temperature=0.0),
        seed=0,
        prompt_token_ids=(0,),
        output_token_ids=(),
        stop_token_ids=frozenset(),
    )
    row = RowPlan(
        request_id="self-test",
        exit_layer=full_depth,
        start=0,
        token_ids=(0,),
        block_table_SB=np.array(pages, dtype=np.int32).reshape(-1, 1),
        sampling=sampling,
    )
    try:
        [result] = runner.execute(StepPlan(rows=(row,), depth_cap=full_depth))
    except Exception:
        logger.exception("the self-test failed")
        return False
    return isinstance(result, SampledToken)
