"""What a newcomer could expect at an exit, given what runs and waits now (no torch, no clock)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sortserve.core.budget import Deadlines
from sortserve.core.request import Estimate
from sortserve.core.sequence import Promise
from sortserve.cost.model import CostModel, RowShape, StepShape
from sortserve.scheduling.capacity import pressure, shallowest
from sortserve.scheduling.demand import SOFT_GAP_S, Demand, StepCosts, plan_pace, targets_of
from sortserve.scheduling.policy import Policy

__all__ = ["Forecast", "Load", "Newcomer", "forecast", "newcomer_demand", "predicted_drain_s"]

EASES = (1.0, 0.6, 0.3)
"""Ways to spread a budget over prompt and tokens (see ``plan_pace``), in the order of trial."""
MAX_BUSY_SHARE = 0.95
"""Times of a newcomer are stretched for the promises before it, at most twentyfold."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The engine's state as far as a newcomer's times depend on it."""

    now: float
    demands: Sequence[Demand] = ()
    """Of all live requests, those that the engine has not yet taken included."""
    policy: Policy
    max_num_batched_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """A request that asks what it could get."""

    num_prompt_tokens: int
    num_output_tokens: int
    """To plan for."""
    arrival_s: float
    deadlines: Deadlines = field(default_factory=Deadlines)
    floor_layer: int | None = None
    weight: float = 1.0

    @property
    def bounds_time(self) -> bool:
        """Whether it wants anything of a time."""
        return self.deadlines != Deadlines()


@dataclass(frozen=True)
class Forecast:
    """What one exit would bring."""

    estimate: Estimate
    keeps: bool
    """The newcomer's times and all promises before it can be kept."""
    keeps_lowered: bool
    """They can if others go shallower for it."""
    promise: Promise


def forecast(exit_layer: int, newcomer: Newcomer, load: Load, model: CostModel) -> Forecast:
    """The predicted times of a newcomer at an exit, and whether they keep every promise.

    The estimate is what it would see if the load stayed as it is: the deepest step that keeps all
    promises, or its own pace where that is slower than the budget allows.
    """
    costs = _costs(load, model)
    own = _own_times(exit_layer, newcomer, costs)
    promise = _promise(newcomer, load.now, own, ease=EASES[0])
    estimate = _estimate(exit_layer, newcomer, load, costs, own, promise)
    if not newcomer.bounds_time:
        return Forecast(estimate, True, True, promise)
    if not load.policy.keeps_promises:
        in_time = _in_time(newcomer, estimate)
        return Forecast(estimate, in_time, in_time, promise)
    promises = [promise, *(_promise(newcomer, load.now, own, ease=ease) for ease in EASES[1:])]
    for others in (load.demands, shallowest(load.demands)):
        for promise in promises:
            if _has_room(exit_layer, newcomer, promise, others, load, costs):
                kept = _kept(estimate, newcomer, promise)
                return Forecast(kept, others is load.demands, True, promise)
    return Forecast(estimate, False, False, promises[0])


def _has_room(
    exit_layer: int,
    newcomer: Newcomer,
    promise: Promise,
    others: Sequence[Demand],
    load: Load,
    costs: StepCosts,
) -> bool:
    """Whether a promise can be kept beside those to others, and theirs beside it."""
    demand = newcomer_demand(exit_layer, newcomer, promise, now=load.now)
    if demand.is_hard and demand.due_s <= load.now:  # however fast the machine
        return False
    needed = pressure(
        [*others, demand],
        costs,
        now=load.now,
        busy_s=_busy_s(load, costs),
        from_due_s=demand.due_s,
    )
    return needed <= 1.0


def predicted_drain_s(
    exit_layer: int, newcomer: Newcomer, load: Load, model: CostModel
) -> float | None:
    """Seconds until so many live requests are over that the newcomer would fit; None if never.

    The promises end when their pace says. A newcomer that would not fit an idle server never does.
    """
    ends = sorted({d.end_s for d in load.demands if math.isfinite(d.end_s)})
    low, high = 0, len(ends)
    if not _fits_after(math.inf, exit_layer, newcomer, load, model):
        return None
    while low < high:
        middle = (low + high) // 2
        if _fits_after(ends[middle], exit_layer, newcomer, load, model):
            high = middle
        else:
            low = middle + 1
    return max(0.0, ends[low] - load.now) if low < len(ends) else 0.0


def _fits_after(
    end_s: float, exit_layer: int, newcomer: Newcomer, load: Load, model: CostModel
) -> bool:
    rest = [d for d in load.demands if d.end_s > end_s and math.isfinite(end_s)]
    later = replace(load, demands=rest)
    return forecast(exit_layer, newcomer, later, model).keeps_lowered


# ---- parts ----


def _costs(load: Load, model: CostModel) -> StepCosts:
    num_decoding = sum(d.is_decoding for d in load.demands)
    return StepCosts(
        model,
        num_rows=num_decoding + 1,
        chunk=load.max_num_batched_tokens,
        safety=model.safety,
    )


def _own_times(exit_layer: int, newcomer: Newcomer, costs: StepCosts) -> tuple[float, float]:
    """Seconds of its prompt and of each further token, were it alone."""
    context_len = newcomer.num_prompt_tokens + newcomer.num_output_tokens // 2
    return (
        costs.prefill_s(exit_layer, newcomer.num_prompt_tokens),
        costs.decode_s(exit_layer, context_len),
    )


def _promise(newcomer: Newcomer, now: float, own: tuple[float, float], *, ease: float) -> Promise:
    targets = targets_of(newcomer.deadlines, newcomer.arrival_s)
    pace = plan_pace(
        targets,
        now=now,
        num_tokens=newcomer.num_output_tokens,
        prefill_s=own[0],
        decode_s=own[1],
        ease=ease,
    )
    return Promise(targets, pace.first_due_s, pace.gap_s)


def newcomer_demand(
    exit_layer: int,
    newcomer: Newcomer,
    promise: Promise | None,
    *,
    now: float,
    request_id: str = "",
) -> Demand:
    """The demand of a request that the engine has not yet taken."""
    first_due_s = math.inf if promise is None else promise.first_due_s
    gap_s = math.inf if promise is None else promise.gap_s
    is_hard = math.isfinite(first_due_s)
    start_s = first_due_s if is_hard else now
    num_gaps = newcomer.num_output_tokens - 1
    end_s = start_s + (num_gaps * gap_s if math.isfinite(gap_s) else 0.0)
    return Demand(
        request_id=request_id,
        exit_layer=exit_layer,
        floor_layer=exit_layer if newcomer.floor_layer is None else newcomer.floor_layer,
        order=newcomer.arrival_s,
        num_pending=newcomer.num_prompt_tokens,
        context_len=0,
        is_waiting=True,
        is_promised=promise is not None,
        is_hard=is_hard,
        due_s=first_due_s if is_hard else now + SOFT_GAP_S,
        gap_s=min(gap_s, SOFT_GAP_S),
        end_s=end_s if promise is not None else math.inf,
        weight=newcomer.weight,
        num_left=newcomer.num_output_tokens,
    )


def _busy_s(load: Load, costs: StepCosts) -> float:
    """What the step under way still takes, in the mean: half of it."""
    running = [d for d in load.demands if not d.is_waiting]
    if not running:
        return 0.0
    deepest = max(d.exit_layer for d in running)
    rows = sum(costs.row_s(d.exit_layer, d.context_len) for d in running if d.is_decoding)
    return (costs.base_s(deepest) + rows) / 2


def _in_time(newcomer: Newcomer, estimate: Estimate) -> bool:
    arrival_s, deadlines = newcomer.arrival_s, newcomer.deadlines
    return (
        (deadlines.ttft_s is None or arrival_s + estimate.ttft_s <= deadlines.ttft_s)
        and (deadlines.tpot_s is None or estimate.tpot_s <= deadlines.tpot_s)
        and (deadlines.e2e_s is None or arrival_s + estimate.e2e_s <= deadlines.e2e_s)
    )


def _estimate(
    exit_layer: int,
    newcomer: Newcomer,
    load: Load,
    costs: StepCosts,
    own: tuple[float, float],
    promise: Promise,
) -> Estimate:
    """Its times if the load stayed as it is."""
    running = [d for d in load.demands if not d.is_waiting]
    prompts = [d for d in load.demands if not d.is_decoding]
    tpot_s = _shared_tpot_s(exit_layer, newcomer, load, costs)
    queue_s = sum(d.work_s(costs) for d in prompts if _goes_before(d, newcomer, promise, load))
    shared_s = tpot_s if running else 0.0
    waited_s = max(0.0, load.now - newcomer.arrival_s)
    ttft_s = waited_s + _busy_s(load, costs) + queue_s + shared_s + own[0]
    if load.policy.keeps_promises:
        hard = [d for d in load.demands if d.is_decoding and d.is_promised]
        share = min(pressure(hard, costs, now=load.now), MAX_BUSY_SHARE) if hard else 0.0
        tpot_s = max(tpot_s, own[1] / (1.0 - share)) if newcomer.bounds_time else tpot_s
        ttft_s = waited_s + _busy_s(load, costs) + (queue_s + own[0]) / (1.0 - share)
    num_gaps = newcomer.num_output_tokens - 1
    return Estimate(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=ttft_s + num_gaps * tpot_s)


def _kept(estimate: Estimate, newcomer: Newcomer, promise: Promise) -> Estimate:
    """The estimate of a request whose promise has room: it runs no slower than its pace."""
    ttft_s, tpot_s = estimate.ttft_s, estimate.tpot_s
    if math.isfinite(promise.first_due_s):
        ttft_s = min(ttft_s, promise.first_due_s - newcomer.arrival_s)
    tpot_s = min(tpot_s, promise.gap_s)
    num_gaps = newcomer.num_output_tokens - 1
    return Estimate(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=ttft_s + num_gaps * tpot_s)


def _goes_before(demand: Demand, newcomer: Newcomer, promise: Promise, load: Load) -> bool:
    """Whether a prompt that is not read yet has its turn before the newcomer's."""
    if not load.policy.keeps_promises:
        return True
    if math.isfinite(promise.first_due_s):
        return demand.is_hard and demand.due_s <= promise.first_due_s
    return True


def _shared_tpot_s(exit_layer: int, newcomer: Newcomer, load: Load, costs: StepCosts) -> float:
    """The time of a token if all rows take part in all steps that the policy would make."""
    contexts: dict[int, list[int]] = {exit_layer: []}
    for demand in load.demands:
        if not demand.is_waiting:
            contexts.setdefault(demand.exit_layer, []).append(demand.context_len)
    contexts[exit_layer].append(newcomer.num_prompt_tokens + newcomer.num_output_tokens // 2)
    seconds = {}
    for cap in contexts:
        rows = [
            RowShape(e, 1, context_len, samples=True)
            for e, lens in contexts.items()
            for context_len in lens
            if e <= cap
        ]
        seconds[cap] = costs.model.step_s(StepShape.of(rows)) * costs.safety
    any_soft = not newcomer.bounds_time or any(
        not d.is_promised for d in load.demands if not d.is_waiting
    )
    if load.policy.keeps_promises and not any_soft:
        return seconds[max(seconds)]  # a step is as deep as it can be while all are in time
    return 1.0 / load.policy.rates(seconds)[exit_layer]
