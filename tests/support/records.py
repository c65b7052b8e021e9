"""What an engine with exits 9 and 30 tells of a step and of a finished request, for observers."""

from __future__ import annotations

from sortserve.core.budget import Budget
from sortserve.core.request import FinishReason, RequestReport, StepRecord

__all__ = ["EXITS", "REPORT", "STEP"]

EXITS = (9, 30)
STEP = StepRecord(
    duration_s=0.02,
    predicted_s=0.021,
    depth_cap=30,
    rows_by_exit={9: 3, 30: 1},
    tokens_by_exit={9: 3, 30: 1},
    layers_run=9 * 3 + 30 * 10,
    layers_full=30 * 13,
    ttfts=((30, 0.05),),
    itls=((9, 0.004), (9, 0.004), (9, 0.02)),
    num_preemptions=1,
    num_prompt_tokens=26,
    prefix_cache_queries=26,
    prefix_cache_hits=16,
    exit_changes=((30, 9, "late"),),
)
REPORT = RequestReport(
    request_id="r1",
    budget=Budget(),
    finish_reason=FinishReason.STOP,
    num_prompt_tokens=26,
    num_cached_tokens=16,
    num_output_tokens=11,
    exit_layer=9,
    tokens_by_exit={9: 11},
    compute=0.4,
    predicted=None,
    arrival_s=100.0,
    first_scheduled_s=100.25,
    first_token_s=100.5,
    last_token_s=101.5,
    finished_s=101.5,
)
