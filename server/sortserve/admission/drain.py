"""When to come back: the time until what is refused now would fit (no torch, no clock)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

from sortserve.admission.entry import course_of
from sortserve.admission.forecast import forecast
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.admission.play import Course
from sortserve.core.budget import Deadlines
from sortserve.cost.model import CostModel
from sortserve.scheduling.demand import StepCosts

__all__ = ["Drains", "predicted_drain_s", "predicted_places_s", "queue_delay_s"]

LOOK_AHEAD = 3
"""It must fit after so many further ends, too: whose turn it is then may be somebody else's."""
KEEP_S = 0.25
MAX_TOLD = 256


def predicted_drain_s(
    exit_layer: int,
    newcomer: Newcomer,
    load: Load,
    model: CostModel,
    *,
    limit: float = math.inf,
) -> float | None:
    """Seconds until so many live requests are over that the newcomer would fit; None if never.

    One that would not fit an idle server never does. Others may lose ``limit`` for it by then.
    """
    course = _course(load, model)

    def fits_in(seconds: float) -> bool:
        later = _load_in(seconds, load, course)
        wait_s = later.now - load.now
        outlook = Outlook(later, model, (exit_layer,))
        asking = _asking_in(wait_s, newcomer)
        return forecast(exit_layer, asking, outlook, limit=limit).loss is not None

    ends = sorted({0.0, *course.over_s.values()})
    low, high = 0, len(ends) - 1
    if not fits_in(ends[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        if fits_in(ends[middle]):
            high = middle
        else:
            low = middle + 1
    checked = low + 1
    while checked <= min(low + LOOK_AHEAD, len(ends) - 1):
        if fits_in(ends[checked]):
            checked += 1
        else:
            low = checked = checked + 1
    return ends[low]


class Drains:
    """What requests were told lately, so that a crowd that is refused costs little.

    To find when a request would fit takes a dozen forecasts. Those of about the same size, time,
    weight and number (within a factor of two) are told the same for ``KEEP_S``.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[int, ...], tuple[float, float | None]] = {}

    def ask(
        self,
        exit_layer: int,
        newcomer: Newcomer,
        now: float,
        predict: Callable[[], float | None],
    ) -> float | None:
        """What one like it was told, or what is predicted now."""
        deadlines, arrival_s = newcomer.deadlines, newcomer.arrival_s
        times_s = (
            None if deadlines.ttft_s is None else deadlines.ttft_s - arrival_s,
            None if deadlines.e2e_s is None else deadlines.e2e_s - arrival_s,
            deadlines.tpot_s,
        )
        key = (
            exit_layer,
            newcomer.reading(exit_layer)[0].bit_length(),
            newcomer.num_output_tokens.bit_length(),
            newcomer.num_siblings.bit_length(),
            math.frexp(newcomer.weight)[1],
            *(0 if s is None else int(1e6 * s).bit_length() for s in times_s),
        )
        at_s, told = self._told.get(key, (-math.inf, None))
        if not 0.0 <= now - at_s < KEEP_S:
            at_s, told = now, predict()
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told[key] = (at_s, told)
        return told


def predicted_places_s(num_requests: int, num_tokens: int, load: Load, model: CostModel) -> float:
    """Seconds until so many of those that wait, with so many tokens, have their first token.

    Args:
        num_requests: places in the queue that are wanted.
        num_tokens: of their prompts.
        load: with those that wait.
        model: of steps.
    """
    waiting = [d for d in load.demands if not d.is_decoding]
    if not waiting:
        return 0.0
    course, outlook = _course(load, model), Outlook(load, model)
    first_token_s = sorted(
        (
            course.start_s.get(d.request_id, 0.0) + d.work_s(outlook.costs),
            d.num_pending + (d.context_len if d.is_waiting else 0),  # in the queue all of it counts
        )
        for d in waiting
    )
    tokens_left = itertools.accumulate(num_tokens for _, num_tokens in first_token_s)
    enough = (
        seconds
        for index, ((seconds, _), num_gone) in enumerate(
            zip(first_token_s, tokens_left, strict=True)
        )
        if index + 1 >= num_requests and num_gone >= num_tokens
    )
    return next(enough, first_token_s[-1][0])


def _course(load: Load, model: CostModel) -> Course:
    return course_of(Outlook(load, model).queue)


def _asking_in(seconds: float, newcomer: Newcomer) -> Newcomer:
    """The same, if it came so much later."""

    def later(moment_s: float | None) -> float | None:
        return None if moment_s is None else moment_s + seconds

    deadlines = newcomer.deadlines
    return replace(
        newcomer,
        arrival_s=newcomer.arrival_s + seconds,
        deadlines=Deadlines(
            ttft_s=later(deadlines.ttft_s), e2e_s=later(deadlines.e2e_s), tpot_s=deadlines.tpot_s
        ),
    )


def _load_in(seconds: float, load: Load, course: Course) -> Load:
    """What is left of a load after a while."""
    rest = []
    for demand in load.demands:
        start_s, over_s = course.start_s.get(demand.request_id, 0.0), course.over_s
        left_s = over_s[demand.request_id] - seconds
        if left_s <= 0.0:
            continue
        if start_s < seconds:  # it runs by then, with some of its tokens made
            share = min(1.0, left_s / (over_s[demand.request_id] - start_s))
            num_left = max(1, math.ceil(demand.num_left * share))
            num_known = demand.context_len + demand.num_pending + demand.num_left - num_left
            demand = replace(
                demand,
                is_waiting=False,
                num_left=num_left,
                num_pending=1,
                context_len=max(1, num_known - 1),
                next_by_s=math.inf,
            )
        rest.append(demand)
    room = load.room
    held = [d for d in rest if not d.is_waiting]
    num_used = sum(room.pages(d.context_len + d.num_pending, d.exit_layer) for d in held)
    return replace(
        load.with_demands(rest),
        now=load.now + seconds,
        seen_s=None,
        room=replace(room, num_free_pages=max(0, room.num_pages - num_used)),
    )


def queue_delay_s(load: Load, model: CostModel) -> float:
    """Predicted seconds until all prompts that wait or run now have been read."""
    costs = StepCosts(model, chunk=load.max_num_batched_tokens)
    return sum(
        costs.prefill_s(d.exit_layer, d.num_pending, d.context_len, d.num_scored)
        for d in load.demands
        if not d.is_decoding
    )
