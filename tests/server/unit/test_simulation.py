"""What traffic would do on a machine that is not here."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace
from typing import Any

import pytest

from sortserve import simulation
from sortserve.admission.choose import ExitChoice
from sortserve.admission.desk import AdmissionDesk
from sortserve.core.budget import Budget
from sortserve.core.request import Request
from sortserve.cost.machine import Machine
from sortserve.process import profiling
from sortserve.scheduling.policies.table import POLICIES
from sortserve.simulation import Arrival, simulate

LINE = (1e-3, 1e-3, 1e-5, 1e-8, 1e-5)
SMALL = Machine(
    name="small",
    source="invented",
    exits=(2, 6),
    small=LINE,
    large=LINE,
    compute={2: 0.4, 6: 1.0},
    noise=0.0,
)


def arrival(due_s: float, **budget: object) -> Arrival:
    return Arrival(
        due_s=due_s,
        num_prompt_tokens=10,
        num_output_tokens=20,
        budget=Budget.from_mapping(budget),
    )


def test_outcomes_come_in_the_order_of_the_arrivals_and_tell_who_was_refused_and_why() -> None:
    late, hopeless, early = arrival(1.0), arrival(0.5, latency_ms=1, on_miss="reject"), arrival(0.0)

    run = simulate(SMALL, [late, hopeless, early])

    assert [outcome.arrival for outcome in run.outcomes] == [late, hopeless, early]
    served = [outcome.report for outcome in run.outcomes if outcome.report is not None]
    assert [report.num_output_tokens for report in served] == [20, 20]
    assert run.outcomes[1].report is None
    assert run.outcomes[1].error is not None
    assert run.outcomes[1].error.status == 429


def test_without_noise_a_request_alone_takes_what_the_cost_model_says() -> None:
    run = simulate(SMALL, [arrival(3.0)])

    report = run.outcomes[0].report
    assert report is not None
    assert report.ttft_s == pytest.approx(SMALL.model.prefill_s(6, 10))
    assert report.e2e_s == pytest.approx(20 * 7e-3, rel=0.02)
    assert run.wall_s == pytest.approx(3.0 + report.e2e_s)


def test_who_comes_during_a_step_is_judged_then_and_joins_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = dict[str, float]()
    choose = AdmissionDesk.choose

    def watched(self: AdmissionDesk, request: Request, *args: Any, **kwargs: Any) -> ExitChoice:
        judged[request.request_id] = self.clock()
        return choose(self, request, *args, **kwargs)

    monkeypatch.setattr(AdmissionDesk, "choose", watched)
    long = replace(arrival(0.0), num_prompt_tokens=1000)

    run = simulate(SMALL, [long, arrival(0.02), arrival(0.05)])

    assert judged == {"0": 0.0, "1": 0.02, "2": 0.05}
    over_s = SMALL.model.prefill_s(6, 1000)
    assert over_s > 0.06
    for outcome in run.outcomes[1:]:
        assert outcome.report is not None
        assert outcome.report.ttft_s is not None
        assert outcome.report.ttft_s > over_s - outcome.arrival.due_s


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_answers_a_crowd_in_full(policy: str) -> None:
    crowd = [arrival(0.001 * i, exit_layer=(2, 6)[i % 2]) for i in range(30)]

    run = simulate(SMALL, crowd, policy=policy, max_num_seqs=8)

    assert all(o.report is not None and o.report.num_output_tokens == 20 for o in run.outcomes)
    assert len(run.step_errors) == run.num_steps


def test_the_example_of_the_module_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling, "measured_machine", lambda model_name: SMALL)
    example = re.search(r"(?:^    .*\n|\n)+^    .*\n", simulation.__doc__ or "", re.MULTILINE)
    assert example is not None

    exec(textwrap.dedent(example.group()), {})

    assert re.fullmatch(
        r"100 of 100 were promised .*\n\d+ had one,\n.*100% of the FLOPs\n", capsys.readouterr().out
    )
