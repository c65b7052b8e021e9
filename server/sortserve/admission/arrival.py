"""A newcomer is judged, and remembered as one that has come (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from sortserve.admission.choose import ExitChoice
from sortserve.admission.offered import NOTHING_OFFERED, Offered
from sortserve.admission.outlook import Load
from sortserve.admission.question import Question
from sortserve.core.errors import BudgetUnattainableError
from sortserve.cost.model import CostModel
from sortserve.scheduling.demand import StepCosts
from sortserve.scheduling.objective import Worth

__all__ = ["judge_arrival"]


def judge_arrival(
    asked: Question,
    load: Load,
    judge: Callable[[Load], ExitChoice],
    offered: Offered,
    *,
    model: CostModel,
    worth: Worth,
) -> ExitChoice:
    """The exit for a newcomer.

    One that is refused only for the sake of those who come later is none of them itself: requests
    that are all alike would keep each other out, and nobody would come in.

    Args:
        asked: who, and where it may go.
        load: what it meets.
        judge: says which exit it gets with a load.
        offered: where it is noted.
        model: of steps.
        worth: what the objective says of answers.

    Raises:
        BudgetUnattainableError: none fits and the budget says reject.
    """
    costs = StepCosts(model, chunk=load.max_num_batched_tokens)
    work_s = asked.num_sequences * asked.alone.reading_s(asked.starts[-1], costs)
    lost = asked.worth(worth)
    try:
        return judge(load)
    except BudgetUnattainableError:
        if load.offered.worth > 0.0:
            with suppress(BudgetUnattainableError):
                judge(replace(load, offered=NOTHING_OFFERED))
                work_s = lost = 0.0
        raise
    finally:
        offered.note(load.now, work_s, lost)
