"""Who counts as one that has come: not who is refused for the sake of others like them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sortserve.admission.arrival import judge_arrival
from sortserve.admission.choose import ExitChoice
from sortserve.admission.offered import LEAST, NOTHING_OFFERED, Offered, OfferedLoad
from sortserve.admission.outlook import Load, Newcomer
from sortserve.admission.question import Question
from sortserve.core.errors import BudgetUnattainableError
from sortserve.scheduling.objective import Worth
from sortserve.scheduling.policies.table import get_policy
from support.timed import COSTS, MODEL, timed_request

WORTH = Worth(answer={2: 1.0, 6: 2.0}, tokens={2: 0.0, 6: 1.0})
CHOICE = ExitChoice(6, None, fits=True)


def let_in(load: Load) -> ExitChoice:
    return CHOICE


def refused(load: Load) -> ExitChoice:
    raise BudgetUnattainableError("no room", param="budget.latency_ms", retry_after_s=1.0)


def refused_for_later_ones(load: Load) -> ExitChoice:
    return let_in(load) if load.offered == NOTHING_OFFERED else refused(load)


def after(judge: Callable[[Load], ExitChoice], *, beside: OfferedLoad) -> OfferedLoad:
    """What is offered after a few that were judged so, one a second."""
    request, offered = timed_request("r", 400, at=0.0, latency_ms=900, on_miss="reject"), Offered()
    for i in range(LEAST):
        now = float(i)
        deadlines = request.budget.deadlines(now)
        newcomer = Newcomer(
            num_prompt_tokens=400, num_output_tokens=10, arrival_s=now, deadlines=deadlines
        )
        asked = Question(replace(request, arrival_s=now), newcomer, (2, 6), (2, 6))
        load = Load(now=now, policy=get_policy("deadline"), offered=beside)
        try:
            judge_arrival(asked, load, judge, offered, model=MODEL, worth=WORTH)
        except BudgetUnattainableError:
            assert judge is not let_in
        else:
            assert judge is let_in
    offered.check_invariants()
    return offered.load(float(LEAST - 1))


@pytest.mark.parametrize("judge", [let_in, refused])
def test_who_comes_counts_let_in_or_not(judge: Callable[[Load], ExitChoice]) -> None:
    found = after(judge, beside=OfferedLoad(0.3, 5.0))

    work_s = COSTS.prefill_s(6, 400, 0) - COSTS.base_s(6)
    assert found.share == pytest.approx(work_s, rel=0.05)
    assert found.worth > 0.0


def test_who_is_refused_only_for_the_sake_of_later_ones_is_none_of_them() -> None:
    assert after(refused_for_later_ones, beside=OfferedLoad(0.3, 5.0)) == NOTHING_OFFERED


def test_a_refusal_is_not_looked_into_where_nobody_is_expected() -> None:
    asked = list[Load]()

    def refuse(load: Load) -> ExitChoice:
        asked.append(load)
        return refused(load)

    after(refuse, beside=NOTHING_OFFERED)

    assert len(asked) == LEAST
