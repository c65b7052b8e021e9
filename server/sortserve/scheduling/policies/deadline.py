"""``deadline``: what was promised is kept by pacing; what is left over is shared fairly.

It may hold rows back that have time, where there is no room for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.objective import Worth
from sortserve.scheduling.policies.fair import fair, fair_rates
from sortserve.scheduling.policy import MOST_STEPS, Lowering, Policy, Situation, StepChoice

__all__ = ["DEADLINE", "deadline", "least_slack_first", "most_slack_last_admitted"]

MIN_CHUNK = 32
"""Tokens of a prompt that must get on, whoever waits for it."""


def deadline(situation: Situation) -> StepChoice:
    """The deepest cap that keeps every live promise; the least slack decides where none does.

    As long as each answer as a whole has time to spare, all rows up to the cap run; once one has
    none, rows are paced (see ``full_batch``). Beside soft rows (those that were promised no time)
    ``fair`` chooses among the caps that keep the promises, so that a shallow exit is worth
    something to them too. A soft row that has not had a part in a step for long is as urgent as a
    promise, so nobody starves.
    """
    caps = sorted((c.exit_layer for c in situation.classes), reverse=True)
    careful = _careful(situation)
    spare_s = _spare_s(careful)
    if spare_s >= 0.0:
        situation, option_at = careful, partial(_full, careful, spare_s)
    else:
        option_at = partial(_paced, situation)
    rows, now = situation.rows, situation.now
    best = next((option for option in map(option_at, caps) if option.keeps), None)
    if best is None:
        urgent = min(rows, key=lambda d: (_latest_s(d, situation.costs), d.order))
        return _rescue(situation, urgent)
    if any(not d.is_hard for d in rows):
        wanted = option_at(fair(situation.classes))
        best = wanted if wanted.keeps else best
    return best.choice(situation, now)


@dataclass(frozen=True)
class _Option:
    """A step down to one cap: the rows that fit, and the time that is left for prompts."""

    cap: int
    keeps: bool
    decoding: tuple[Demand, ...]
    prompts: tuple[Demand, ...]
    step_s: float
    """Without prompts."""
    until_s: float
    """When the step must be over."""
    most_s: float = math.inf
    """What prompts may take of it at most."""

    def choice(self, situation: Situation, now: float) -> StepChoice:
        prompts, num_tokens = _reading(situation, self, now)
        ids = tuple(d.request_id for d in (*self.decoding, *prompts))
        return StepChoice(self.cap, ids, num_tokens)


def _careful(situation: Situation) -> Situation:
    """The same, reckoned with the safety factor: what an answer can spare is spent but once."""
    costs = situation.costs
    return replace(situation, costs=replace(costs, safety=costs.model.safety))


def _spare_s(situation: Situation) -> float:
    """What the answer with the least time to spare has, if from now on each step ran everybody."""
    from sortserve.scheduling.full_batch import least_spare_s  # numpy: see ``_lower``

    exits = sorted(c.exit_layer for c in situation.classes)
    return least_spare_s(situation.rows, exits, situation.costs, situation.now)


def _full(situation: Situation, spare_s: float, cap: int) -> _Option:
    """All rows that a cap reaches, in what the answers can spare.

    A step of all decoding rows takes none of it, only what makes it longer does: prompts, and
    layers that they alone need. A step that leaves a decoding row out takes it whole. Prompts that
    are left out can wait until their work has to begin.
    """
    rows, now, costs = situation.rows, situation.now, situation.costs
    reached = sorted((d for d in rows if d.exit_layer <= cap), key=_by_due)
    decoding = tuple(d for d in reached if d.is_decoding)
    prompts = tuple(d for d in reached if not d.is_decoding)
    rows_s = sum(_row_s(d, costs) for d in decoding)
    step_s = costs.base_s(cap) + rows_s
    deepest = max((d.exit_layer for d in rows if d.is_decoding), default=cap)
    free_s = costs.base_s(deepest) + rows_s if deepest <= cap else 0.0
    left_out = (d for d in rows if d.exit_layer > cap and not d.is_decoding)
    until_s = min((_latest_s(d, costs) for d in left_out), default=math.inf)
    until_s = min(until_s, now + free_s + spare_s)
    most_s = MOST_STEPS * step_s if decoding else math.inf
    return _Option(cap, now + step_s <= until_s, decoding, prompts, step_s, until_s, most_s)


def _row_s(demand: Demand, costs: StepCosts) -> float:
    return demand.num_pending * costs.row_s(demand.exit_layer, demand.context_len)


def _paced(situation: Situation, cap: int) -> _Option:
    """Fill a step: rows in order of their due times, as long as all of them are in time."""
    now, costs = situation.now, situation.costs
    step_s, until_s = costs.base_s(cap), math.inf
    reachable = sorted((d for d in situation.rows if d.exit_layer <= cap), key=_by_due)
    decoding, prompts, any_late = [], [], False
    held = [d for d in situation.rows if d.exit_layer > cap]
    for demand in reachable:
        if not demand.is_decoding:
            prompts.append(demand)
            continue
        more_s = _row_s(demand, costs)
        is_late = demand.due_s < now + costs.base_s(demand.exit_layer) + more_s
        if is_late or now + step_s + more_s <= min(until_s, demand.due_s):
            decoding.append(demand)
            step_s += more_s
            any_late = any_late or is_late
            until_s = until_s if is_late else min(until_s, demand.due_s)
        else:
            held.append(demand)
    keeps = True
    for demand in held:
        start_s = _latest_s(demand, costs)
        keeps = keeps and now + step_s <= start_s
        until_s = min(until_s, start_s)
    if any_late:  # what is late already should not get later: no prompt runs beside it at leisure
        until_s = min(until_s, now + step_s)
    return _Option(cap, keeps, tuple(decoding), tuple(prompts), step_s, until_s)


def _latest_s(demand: Demand, costs: StepCosts) -> float:
    """When its next token, or the next part of a prompt that nobody was promised, has to begin.

    A soft prompt is due for a step and not for its end: one that takes longer to read than soft
    requests wait for a step would else be urgent all the time, and never leave the promises theirs.
    """
    if demand.is_hard or demand.is_decoding:
        return demand.due_s - demand.work_s(costs)
    num_tokens = min(demand.num_pending, MIN_CHUNK)
    return demand.due_s - costs.prefill_s(demand.exit_layer, num_tokens, demand.context_len)


def _by_due(demand: Demand) -> tuple[bool, float, float]:
    """Promises by their due time, then soft rows in order of arrival."""
    return not demand.is_hard, demand.due_s if demand.is_hard else 0.0, demand.order


def _reading(situation: Situation, option: _Option, now: float) -> tuple[tuple[Demand, ...], int]:
    """The prompts of a step, in the order in which they get tokens, and how many it has time for.

    Where it has none, a soft prompt that is due gets on nevertheless: by itself, for whoever is
    before it would take its tokens, and it would be due in the next step again.
    """
    if not option.prompts:
        return (), 0
    num_tokens = _tokens_in_time(situation, option, now)
    if num_tokens:
        return option.prompts, num_tokens
    costs, room = situation.costs, situation.max_num_tokens - len(option.decoding)
    due = [d for d in option.prompts if not d.is_hard and _is_due(d, option, costs, now)]
    if not due or room <= 0:
        return (), 0
    return (due[0],), min(room, _hurried_tokens(option.step_s, _token_s(due[0], costs)))


def _tokens_in_time(situation: Situation, option: _Option, now: float) -> int:
    """Tokens of prompts that the step has time for; more where a promised one is due, or alone."""
    costs = situation.costs
    room = max(0, situation.max_num_tokens - len(option.decoding))
    first = option.prompts[0]
    token_s = _token_s(first, costs)
    room = _in_time_for_those_that_end(option, room, now, token_s)
    if math.isinf(option.until_s):
        return room
    spare_s = option.until_s - now - option.step_s - costs.large_extra_s(option.cap)
    num_tokens = int(max(0.0, min(spare_s, option.most_s) / token_s))
    is_urgent = any(d.is_hard and _is_due(d, option, costs, now) for d in option.prompts)
    if is_urgent or not option.decoding:
        num_tokens = max(num_tokens, _hurried_tokens(option.step_s, token_s))
    return min(room, num_tokens) if num_tokens >= min(MIN_CHUNK, first.num_pending) else 0


def _is_due(prompt: Demand, option: _Option, costs: StepCosts, now: float) -> bool:
    return _latest_s(prompt, costs) <= now + option.step_s


def _token_s(prompt: Demand, costs: StepCosts) -> float:
    """One more of its tokens, in the mean."""
    context_len = prompt.context_len + prompt.num_pending // 2
    return costs.token_s(prompt.exit_layer, context_len, is_scored=prompt.num_scored > 0)


def _in_time_for_those_that_end(option: _Option, room: int, now: float, token_s: float) -> int:
    """No more tokens than let the promised prompts that are read to their end do so in time.

    Else a prompt that is due would wait, in the very step that ends it, for others that are not.
    """
    num_read = 0
    for prompt in option.prompts:
        num_read += prompt.num_pending
        if not prompt.is_hard or num_read >= room:
            break
        num_in_time = int(max(0.0, (prompt.due_s - now - option.step_s) / token_s))
        room = max(num_read, min(room, num_in_time))
    return room


def _hurried_tokens(step_s: float, token_s: float) -> int:
    """Tokens of a prompt that is late beside rows that are: each gets half of the time."""
    return max(MIN_CHUNK, int(step_s / token_s))


def _rescue(situation: Situation, urgent: Demand) -> StepChoice:
    """Nothing keeps every promise: a step for the least slack, and for all who are due with it."""
    costs, cap = situation.costs, urgent.exit_layer
    reachable = sorted((d for d in situation.rows if d.exit_layer <= cap), key=_by_due)
    step_s = costs.base_s(cap)
    due = [
        d
        for d in reachable
        if d.is_decoding and (d.is_hard or d.due_s <= situation.now + step_s or d is urgent)
    ]
    if urgent.is_decoding:
        return StepChoice(cap, tuple(d.request_id for d in due), 0)
    step_s += sum(_row_s(d, costs) for d in due)
    token_s = _token_s(urgent, costs)
    num_tokens = min(situation.max_num_tokens - len(due), _hurried_tokens(step_s, token_s))
    # At least one: it may be all that is left, once those who are due have lost their pages.
    return StepChoice(cap, tuple(d.request_id for d in (*due, urgent)), max(1, num_tokens))


def least_slack_first(waiting: Sequence[Demand], costs: StepCosts) -> list[Demand]:
    """The order in which waiting requests enter: promises by least slack, then soft ones.

    Of the soft ones those of more weight go first, of equals the first that came.
    """

    def rank(demand: Demand) -> tuple[bool, float, float]:
        if demand.is_hard:
            return False, demand.due_s - demand.work_s(costs), demand.order
        return True, -demand.weight, demand.order

    return sorted(waiting, key=rank)


def most_slack_last_admitted(candidates: Sequence[Demand]) -> str:
    """Whom to preempt, of running requests in their order of admission.

    The soft request of least weight, of equals the last admitted; without a soft one the promise
    that is due last. Of several soft ones the oldest is spared: it gets on, whatever its weight.
    """
    soft = [demand for demand in candidates if not demand.is_promised]
    if len(soft) > 1:
        soft.remove(min(soft, key=lambda d: d.order))
    if soft:
        return min(reversed(soft), key=lambda d: d.weight).request_id
    return max(candidates, key=lambda d: d.due_s).request_id


def _lower(
    demands: Sequence[Demand],
    exits: Sequence[int],
    costs: StepCosts,
    now: float,
    worth: Worth,
) -> list[Lowering]:
    from sortserve.scheduling.lowering import lower  # the command line need not wait for numpy

    return lower(demands, exits, costs, now, worth)


DEADLINE = Policy(
    name="deadline",
    about="keeps the promised times",
    cap=fair,
    rates=fair_rates,
    choose=deadline,
    lower=_lower,
    entry_order=least_slack_first,
    victim=most_slack_last_admitted,
    keeps_promises=True,
)
