"""A newcomer as the demand that it would be (no torch, no clock)."""

from __future__ import annotations

import math
from dataclasses import replace

from sortserve.admission.outlook import Newcomer
from sortserve.core.sequence import Promise
from sortserve.scheduling.demand import NO_GAP_S, SOFT_GAP_S, Demand, StepCosts, end_of

__all__ = ["newcomer_demand", "spread"]


def newcomer_demand(
    exit_layer: int,
    newcomer: Newcomer,
    promise: Promise | None,
    *,
    now: float,
    request_id: str = "",
    may_move: bool = True,
) -> Demand:
    """The demand of a request that the engine has not yet taken; it stays unless it may move."""
    first_due_s = math.inf if promise is None else promise.first_due_s
    gap_s = math.inf if promise is None else promise.gap_s
    is_hard = math.isfinite(first_due_s)
    floor_layer = newcomer.floor_layer
    num_pending, context_len = newcomer.reading(exit_layer)
    return Demand(
        request_id=request_id,
        exit_layer=exit_layer,
        floor_layer=floor_layer if may_move and floor_layer is not None else exit_layer,
        order=newcomer.arrival_s,
        num_pending=num_pending,
        context_len=context_len,
        is_waiting=True,
        is_promised=promise is not None,
        is_hard=is_hard,
        due_s=first_due_s if is_hard else now + SOFT_GAP_S,
        gap_s=min(gap_s, SOFT_GAP_S),
        end_s=math.inf if promise is None else end_of(promise, now, newcomer.num_output_tokens),
        weight=newcomer.weight,
        num_left=newcomer.num_output_tokens,
        num_scored=newcomer.num_scored,
    )


def spread(demand: Demand, newcomer: Newcomer, costs: StepCosts) -> Demand:
    """A demand whose time is spread over its tokens by what each costs, where a schedule differs.

    So its first tokens, the deepest, may take longer than the mean.
    """
    if newcomer.schedule is None:
        return demand
    exit_layer, context_len = demand.exit_layer, newcomer.num_prompt_tokens
    token_s = costs.decode_s(exit_layer, context_len)
    mean_s = newcomer.mean(lambda e: costs.decode_s(e, context_len), exit_layer)
    share = max(token_s, NO_GAP_S) / max(mean_s, NO_GAP_S)
    return replace(demand, gap_s=demand.gap_s * share, next_share=share)
