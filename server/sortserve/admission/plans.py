"""The plans that a newcomer may get beside one exit for all its tokens (pure, no torch).

A depth schedule that the checkpoint's evaluation has measured is a plan like an exit: it has a
worth and a cost. Only who has a time and leaves its depth to the server may get one: for all others
depth is not taken without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from sortserve.admission.choose import ScheduledPlan, worth_beside
from sortserve.admission.forecast import Forecast
from sortserve.admission.outlook import Newcomer
from sortserve.core.request import Request
from sortserve.scheduling.objective import Worth

__all__ = ["scheduled_plans"]


class PredictNewcomer(Protocol):
    """The present forecast of a newcomer at an exit."""

    def __call__(self, exit_layer: int, newcomer: Newcomer, *, limit: float) -> Forecast:
        """The forecast; others may lose ``limit`` for it at most."""


def scheduled_plans(
    request: Request,
    newcomer: Newcomer,
    *,
    starts: Sequence[int],
    allowed: Sequence[int],
    worth: Worth,
    weight: float,
    predict: PredictNewcomer,
) -> Iterator[ScheduledPlan]:
    """The measured schedules that a request may follow.

    Those of which every exit is allowed, and which its answer, as long as it is planned, follows
    below the first exit. The worth is the mean over its tokens of what each one's exit is worth,
    and at most what was measured: where the answers that it was measured on were longer, they went
    deeper down, and nothing is known of the first part alone.

    Args:
        request: who asks.
        newcomer: the same.
        starts: the exits at which it may start, ascending.
        allowed: the exits that its tokens may be made at, ascending.
        worth: what the objective says.
        weight: of the request, or of several that are taken together.
        predict: a forecast.
    """
    if not _may_follow(request):
        return
    worth_of = worth_beside(starts[-1], worth, weight)
    for schedule, most in worth.schedules.items():
        (_, first), (second_k, _) = schedule.parts[:2]
        is_open = first in starts and all(e in allowed for e in schedule.exits)
        if is_open and newcomer.num_output_tokens > second_k:
            follower = replace(newcomer, schedule=schedule)
            tokens = min(most, follower.mean(worth.tokens.__getitem__, first))
            own = partial(predict, first, follower)
            yield ScheduledPlan(schedule, worth_of(tokens), own)


def _may_follow(request: Request) -> bool:
    """Whether the server may let the depth of an answer fall along a schedule of its own choice.

    What the model says of a prompt, it says at one exit.
    """
    budget = request.budget
    leaves_depth = budget.has_latency and not budget.fixes_depth
    return leaves_depth and request.prompt_logprobs is None
