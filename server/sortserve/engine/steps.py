"""What one step was, for the cost model and the metrics (no torch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.request import EngineStats, StepRecord
from sortserve.core.sequence import Sequence
from sortserve.scheduling.scheduler import Scheduler

__all__ = ["engine_stats", "step_record"]


def step_record(
    plan: StepPlan,
    sequences: Mapping[str, Sequence],
    *,
    sampled: Collection[RowPlan],
    full_depth: int,
    previous_token_s: Mapping[str, float | None],
    num_tokens: Mapping[str, int],
    started_s: float,
    now: float,
    predicted_s: float | None,
    failed_rows: Mapping[str, int] = MappingProxyType({}),
    was_retried: bool = False,
) -> StepRecord:
    """The record of an executed plan.

    Args:
        plan: what ran, without the rows that failed.
        sequences: its sequences, after the tokens were handed out.
        sampled: its rows that gave a token to somebody.
        full_depth: layers of the full model.
        previous_token_s: when each sequence's token before this step's came; None: this is its
            first.
        num_tokens: that each sequence got, forced ones included.
        started_s: when the step began.
        now: when it ended.
        predicted_s: what the cost model had said.
        failed_rows: rows that gave no token, by reason.
        was_retried: it was run row by row after it had failed.
    """
    ttfts, itls = [], []
    for row in sampled:
        before = previous_token_s[row.request_id]
        if before is None:
            arrival = sequences[row.request_id].request.arrival_s
            ttfts.append((row.exit_layer, now - arrival))
        else:
            itls.append((row.exit_layer, now - before))
    tokens_by_exit: Counter[int] = Counter()
    for row in sampled:
        tokens_by_exit[row.exit_layer] += num_tokens.get(row.request_id, 1)
    first = [sequences[request_id] for request_id in plan.first_scheduled]
    return StepRecord(
        duration_s=now - started_s,
        predicted_s=None if was_retried else predicted_s,  # of one run, not of two
        depth_cap=plan.depth_cap,
        rows_by_exit=Counter(row.exit_layer for row in plan.rows),
        tokens_by_exit=tokens_by_exit,
        layers_run=sum(row.exit_layer * row.num_tokens for row in plan.rows),
        layers_full=full_depth * plan.num_tokens,
        ttfts=tuple(ttfts),
        itls=tuple(itls),
        num_preemptions=plan.num_preemptions,
        num_prompt_tokens=sum(s.num_prompt_tokens for s in first),
        prefix_cache_queries=sum(s.num_prompt_tokens for s in first),
        prefix_cache_hits=sum(s.num_cached_tokens for s in first),
        exit_changes=plan.exit_changes,
        failed_rows=failed_rows,
        was_retried=was_retried,
        policy_failed=plan.policy_failed,
    )


def engine_stats(scheduler: Scheduler) -> EngineStats:
    """The state between two steps."""
    pool = scheduler.kv_cache.pool
    return EngineStats(
        running_by_exit=scheduler.running_by_exit(),
        num_waiting=scheduler.num_waiting,
        num_waiting_tokens=scheduler.num_waiting_tokens,
        kv_pages_used=pool.num_used,
        kv_pages_cached=pool.num_kept,
        kv_pages_total=pool.num_pages,
    )
