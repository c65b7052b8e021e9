"""What a newcomer could expect at an exit, given what runs and waits now (no torch, no clock)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sortserve.admission.entry import Entry, entry_of
from sortserve.admission.fit import room_for
from sortserve.admission.newcomer import newcomer_demand, spread
from sortserve.admission.outlook import Newcomer, Outlook
from sortserve.core.request import Estimate
from sortserve.core.sequence import Promise
from sortserve.scheduling.demand import Demand, StepCosts, plan_pace, targets_of

__all__ = ["Forecast", "forecast", "siblings"]

EASES = (1.0, 0.6, 0.3)
"""Ways to spread a budget over prompt and tokens (see ``plan_pace``), in the order of trial."""


@dataclass(frozen=True)
class Forecast:
    """What one exit would bring."""

    estimate: Estimate
    loss: float | None
    """What others lose so that the newcomer's times and all promises before it can be kept (worth
    of tokens times weight): those that go shallower, and those that will find no room. None: they
    cannot be kept."""
    promise: Promise


def forecast(
    exit_layer: int,
    newcomer: Newcomer,
    outlook: Outlook,
    *,
    limit: float = math.inf,
) -> Forecast:
    """The predicted times of a newcomer at an exit, and what it costs others to keep every promise.

    Of several that come at once it is that of the last: there must be room for all of them.

    The estimate is what it would see if the load stayed as it is: the deepest step that keeps all
    promises, or its own pace where that is slower than the budget allows.

    Args:
        exit_layer: asked about.
        newcomer: who asks.
        outlook: the load, seen with the present costs; it must know the exit.
        limit: more than this the others shall not lose.
    """
    found = _forecast_of_one(exit_layer, newcomer, outlook, limit, present=outlook)
    if newcomer.num_siblings == 0 or not newcomer.bounds_time:
        return found
    load, others = outlook.load, siblings(exit_layer, newcomer, found, outlook)
    beside = Outlook(load.with_demands((*load.demands, *others)), outlook.model, outlook.also)
    return _forecast_of_one(exit_layer, newcomer, beside, limit, present=outlook)


def _forecast_of_one(
    exit_layer: int, newcomer: Newcomer, outlook: Outlook, limit: float, *, present: Outlook
) -> Forecast:
    """The forecast if nobody comes with it, or all others of ``outlook`` beside ``present`` do."""
    load = outlook.load
    own = _own_times(exit_layer, newcomer, outlook.costs)
    promise = _promise(newcomer, load.now, own, ease=EASES[0])
    entry = _entry(exit_layer, newcomer, outlook)
    if entry.start_s > 0.0 and entry.beside is not None:  # who is over by then does not count
        outlook = outlook.of_those(entry.beside)
    estimate = _estimate(exit_layer, newcomer, outlook, own, promise, entry)
    if not newcomer.bounds_time:
        return Forecast(estimate, 0.0, promise)
    if not load.policy.keeps_promises:
        return Forecast(estimate, 0.0 if _in_time(newcomer, estimate) else None, promise)
    if entry.keeps_others:
        promises = _promises(promise, newcomer, own, entry, outlook)
        best, loss = room_for(
            *(exit_layer, newcomer, promises, outlook, limit),
            present=present,
            enters_now=entry.start_s <= 0.0,
        )
        if best is not None and loss is not None:
            return Forecast(_kept(estimate, newcomer, best), loss, best)
    return Forecast(estimate, None, promise)


def _promises(
    first: Promise, newcomer: Newcomer, own: tuple[float, float], entry: Entry, outlook: Outlook
) -> Iterator[Promise]:
    """What could be promised from its entry on, in the order of trial, if nobody were beside it.

    ``first`` is the first of them if it enters now. It waits for the step under way.
    """
    now, end_s = outlook.load.now, newcomer.deadlines.e2e_s
    start_s, tried = now + entry.start_s, list[Promise]()
    first_token_s = max(start_s, now + outlook.busy_s) + own[0]
    if end_s is not None and first_token_s + (newcomer.num_output_tokens - 1) * own[1] > end_s:
        return
    for ease in EASES:
        is_first = start_s == now and not tried
        promise = first if is_first else _promise(newcomer, start_s, own, ease=ease)
        if promise in tried:  # of a pace alone they are all the same
            continue
        tried.append(promise)
        if first_token_s <= promise.first_due_s:
            yield promise


def _entry(exit_layer: int, newcomer: Newcomer, outlook: Outlook) -> Entry:
    """When it gets a slot and pages, with the promise that is due last, so that it enters last."""
    load = outlook.load
    num_tokens = outlook.most_tokens + newcomer.num_prompt_tokens + newcomer.num_output_tokens
    if load.room.is_ample(len(load.demands) + 1, num_tokens, outlook.exits[-1]):
        return Entry(0.0, None, True)
    promise = None
    if newcomer.bounds_time and load.policy.keeps_promises:
        own = _own_times(exit_layer, newcomer, outlook.costs)
        promise = _promise(newcomer, load.now, own, ease=EASES[-1])
    demand = newcomer_demand(exit_layer, newcomer, promise, now=load.now)
    return entry_of(demand, outlook.queue, now=load.now)


def siblings(
    exit_layer: int, newcomer: Newcomer, found: Forecast, outlook: Outlook
) -> list[Demand]:
    """The demands of those that come with a newcomer, each with what was found for it alone."""
    demand = newcomer_demand(exit_layer, newcomer, found.promise, now=outlook.load.now)
    own = spread(demand, newcomer, outlook.costs)
    return [replace(own, request_id=f"sibling-{i}") for i in range(newcomer.num_siblings)]


# ---- parts ----


def _own_times(exit_layer: int, newcomer: Newcomer, costs: StepCosts) -> tuple[float, float]:
    """Seconds of its prompt and of each further token, were it alone."""
    context_len = newcomer.num_prompt_tokens + newcomer.num_output_tokens // 2
    return (
        costs.prefill_s(exit_layer, *newcomer.reading(exit_layer), newcomer.num_scored),
        newcomer.mean(lambda e: costs.decode_s(e, context_len), exit_layer),
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
    outlook: Outlook,
    own: tuple[float, float],
    promise: Promise,
    entry: Entry,
) -> Estimate:
    """Its times if the load stayed as it is, and it began when it gets a slot and pages."""
    load = outlook.load
    tpot_s = newcomer.mean(lambda e: _shared_tpot_s(e, newcomer, outlook), exit_layer)
    queue_s = _queue_s(outlook, promise)
    entry_s = 0.0
    if entry.start_s > 0.0:  # the prompts of those who enter before are reckoned with there
        entry_s, queue_s = entry.start_s, 0.0
    shared_s = tpot_s if outlook.any_rows else 0.0
    waited_s = max(0.0, load.now - newcomer.arrival_s)
    ttft_s = waited_s + outlook.busy_s + entry_s + queue_s + shared_s + own[0]
    if load.policy.keeps_promises:
        share = outlook.hard_share
        tpot_s = max(tpot_s, own[1] / (1.0 - share)) if newcomer.bounds_time else tpot_s
        ttft_s = waited_s + outlook.busy_s + entry_s + (queue_s + own[0]) / (1.0 - share)
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


def _queue_s(outlook: Outlook, promise: Promise) -> float:
    """Seconds of the prompts that are not read yet and have their turn before the newcomer's."""
    prompts = outlook.prompts
    if outlook.load.policy.keeps_promises and math.isfinite(promise.first_due_s):
        goes_before = prompts.is_hard & (prompts.due_s <= promise.first_due_s)
        return float(prompts.work_s[goes_before].sum())
    return float(prompts.work_s.sum())


def _shared_tpot_s(exit_layer: int, newcomer: Newcomer, outlook: Outlook) -> float:
    """The time of a token if all rows take part in all steps that the policy would make."""
    rows = dict(outlook.rows_by_exit)
    count, tokens = rows.get(exit_layer, (0, 0))
    own_len = newcomer.num_prompt_tokens + newcomer.num_output_tokens // 2
    rows[exit_layer] = (count + 1, tokens + own_len)
    any_soft = not newcomer.bounds_time or outlook.any_soft
    return outlook.paces_of(rows, any_soft=any_soft)[exit_layer]
