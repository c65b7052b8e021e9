"""A policy from outside the package: some functions and a line in the table, and all laws hold.

``shortest`` takes the request with the least work left: it enters first, it is preempted last, and
a step is as deep as it is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.admission.forecast import forecast
from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.core.budget import Deadlines
from sortserve.core.request import Request
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.policies.lockstep import lockstep
from sortserve.scheduling.policies.table import POLICIES
from sortserve.scheduling.policy import Policy, Situation, StepChoice
from support.examples import examples
from support.scripted import ScriptedRunner, add, depth_letter, make_engine, run
from support.timed import MODEL, Timed, make_demand, make_timed, timed_request
from support.workloads import check_report, workloads

# ---- the policy ----


def shortest_first(waiting: Sequence[Demand], costs: StepCosts) -> list[Demand]:
    return sorted(waiting, key=lambda d: (d.work_s(costs), d.order))


def longest(candidates: Sequence[Demand]) -> str:
    return max(candidates, key=lambda d: d.num_pending + d.context_len).request_id


def step_of_the_shortest(situation: Situation) -> StepChoice:
    ordered = shortest_first(situation.rows, situation.costs)
    cap = ordered[0].exit_layer
    ids = tuple(d.request_id for d in ordered if d.exit_layer <= cap)
    return StepChoice(cap, ids, situation.max_num_tokens)


def one_after_the_other(costs: Mapping[int, float]) -> dict[int, float]:
    return dict.fromkeys(costs, 1.0 / sum(costs.values()))


SHORTEST = Policy(
    name="shortest",
    about="takes the least work first",
    cap=lockstep,
    rates=one_after_the_other,
    choose=step_of_the_shortest,
    entry_order=shortest_first,
    victim=longest,
)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    POLICIES[SHORTEST.name] = SHORTEST
    yield
    del POLICIES[SHORTEST.name]


# ---- what must hold of any ----


def test_it_decides_who_enters() -> None:
    timed = make_timed(policy="shortest", max_num_seqs=1)
    timed.arrive(timed_request("before", max_tokens=1))
    timed.step()
    timed.arrive(timed_request("long", 90, max_tokens=1))
    timed.arrive(timed_request("short", 4, max_tokens=1))

    timed.run()

    assert list(timed.reports) == ["before", "short", "long"]


@given(
    workload=workloads(),
    num_pages=st.sampled_from([90, 800]),
    chunk=st.sampled_from([16, 1024]),
    max_num_seqs=st.sampled_from([1, 3, 64]),
)
@settings(max_examples=examples(30), deadline=None)
def test_nobody_starves_no_page_is_lost_and_it_never_fails(
    workload: list[Request], num_pages: int, chunk: int, max_num_seqs: int
) -> None:
    timed = make_timed(
        policy="shortest",
        num_pages=num_pages,
        max_num_batched_tokens=chunk,
        max_num_seqs=max_num_seqs,
    )
    timed.check_every = 1

    timed.run(workload)

    assert set(timed.reports) | set(timed.refusals) == {r.request_id for r in workload}
    assert timed.engine.stats().kv_pages_used == 0
    assert not any(plan.policy_failed for plan in timed.runner.plans)
    for request in workload:
        if request.request_id in timed.reports:
            check_report(timed, request)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([2, 4, 6])), max_size=8),
    num_pages=st.sampled_from([90, 800]),
)
@settings(max_examples=examples(30), deadline=None)
def test_everybody_gets_the_tokens_that_it_gets_alone(
    lengths: list[tuple[int, int]], num_pages: int
) -> None:
    def start() -> Timed:
        return make_timed(policy="shortest", num_pages=num_pages, rule=depth_letter)

    requests = [
        timed_request(str(i), length, max_tokens=9, exit_layer=exit_layer)
        for i, (length, exit_layer) in enumerate(lengths)
    ]
    together = start()
    together.run(requests)

    for request in requests:
        alone = start()
        alone.run([request])
        found, expected = (t.results[request.request_id].token_ids for t in (together, alone))
        assert found == expected


def test_without_a_cost_model_it_only_sets_the_depth() -> None:
    engine = make_engine(policy="shortest", runner=ScriptedRunner(rule=depth_letter))
    for i, exit_layer in enumerate((2, 6)):
        request = timed_request(str(i), max_tokens=3)
        add(engine, request, exit_layer)

    assert all(len(result.token_ids) == 3 for result in run(engine).values())


def test_newcomers_are_told_the_times_that_its_rates_give() -> None:
    timed = make_timed(policy="shortest")
    deep = [make_demand(str(i), 6) for i in range(4)]
    newcomer = Newcomer(
        num_prompt_tokens=4, num_output_tokens=9, arrival_s=0.0, deadlines=Deadlines(tpot_s=0.009)
    )

    def tpot_s(name: str) -> float:
        load = Load(now=0.0, demands=deep, policy=POLICIES[name])
        return forecast(2, newcomer, Outlook(load, MODEL, (2,))).estimate.tpot_s

    assert tpot_s("shortest") > tpot_s("lockstep")
    choice = timed.desk.choose(timed_request("r", tpot_ms=9), (2, 4, 6))
    assert choice.fits
    assert choice.exit_layer == 6


def test_the_command_line_knows_a_policy_that_was_registered_before_it() -> None:
    code = """
from sortserve.scheduling.policies.lockstep import lockstep, lockstep_rates
from sortserve.scheduling.policies.table import POLICIES
from sortserve.scheduling.policy import Policy

POLICIES["shortest"] = Policy(
    name="shortest", about="is new", cap=lockstep, rates=lockstep_rates
)

from sortserve.cli import main

raise SystemExit(main(["serve", "--policy", "shortest", "--print-config"]))
"""

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "policy: shortest" in shown.stdout
