"""Whatever the workload, under every policy: nobody starves, no page is lost, promises are real.

Steps take time here (`sortserve.simulation`), so budgets, downgrades and refusals happen.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.core.request import Request, RequestOutput
from sortserve.scheduling.objective import OBJECTIVES
from sortserve.scheduling.policies.table import POLICIES
from support.examples import examples
from support.timed import MODEL, make_timed, timed_request
from support.workloads import EXITS, check_report, workloads


@given(
    workload=workloads(),
    policy=st.sampled_from(sorted(POLICIES)),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    num_pages=st.sampled_from([90, 150, 800]),
    chunk=st.sampled_from([16, 64, 1024]),
    max_num_seqs=st.sampled_from([1, 3, 64]),
    seed=st.integers(0, 3),
)
@settings(max_examples=examples(60), deadline=None)
def test_everybody_is_answered_and_no_page_is_lost(
    workload: list[Request],
    policy: str,
    objective: str,
    num_pages: int,
    chunk: int,
    max_num_seqs: int,
    seed: int,
) -> None:
    timed = make_timed(
        policy=policy,
        objective=objective,
        num_pages=num_pages,
        max_num_batched_tokens=chunk,
        max_num_seqs=max_num_seqs,
        seed=seed,
    )
    timed.check_every = 1

    timed.run(workload)

    assert set(timed.reports) | set(timed.refusals) == {r.request_id for r in workload}
    assert timed.engine.stats().kv_pages_used == 0
    for request in workload:
        if request.request_id in timed.reports:
            check_report(timed, request)


@given(workload=workloads(), seed=st.integers(0, 3))
@settings(max_examples=examples(30), deadline=None)
def test_no_promise_is_made_that_the_model_says_cannot_be_kept(
    workload: list[Request], seed: int
) -> None:
    timed = make_timed(seed=seed)

    timed.run(workload)

    for request in workload:
        choice = timed.choices.get(request.request_id)
        if choice is None or choice.promise is None:
            continue
        budget, exit_layer = request.budget, choice.exit_layer
        prompt_s = MODEL.prefill_s(exit_layer, len(request.prompt_token_ids))
        token_s = sum(MODEL.small[:1]) + MODEL.small[1] * exit_layer
        end_s = prompt_s + (request.sampling.max_tokens - 1) * token_s
        assert budget.has_latency
        assert prompt_s * 1e3 <= (budget.ttft_ms or math.inf)
        assert end_s * 1e3 <= (budget.latency_ms or math.inf)
        if request.sampling.max_tokens > 1:
            assert token_s * 1e3 <= (budget.tpot_ms or math.inf)


@given(workload=workloads(), seed=st.integers(0, 3))
@settings(max_examples=examples(30), deadline=None)
def test_due_times_never_go_back_and_never_pass_the_deadline(
    workload: list[Request], seed: int
) -> None:
    """But for who goes shallower under a schedule: its next token is cheaper, and due sooner."""
    timed = make_timed(seed=seed)
    due_s: dict[tuple[str, int], float] = {}
    step = timed.step

    def watched() -> list[RequestOutput]:
        outputs = step()
        for demand in timed.engine.demands():
            if not (demand.is_hard and demand.is_decoding):
                continue
            request = workload[int(demand.request_id)]
            end_s = request.budget.deadlines(request.arrival_s).e2e_s or math.inf
            deep_step_s = MODEL.small[0] + MODEL.small[1] * EXITS[-1]
            at = demand.exit_layer if request.budget.schedule is not None else 0
            seen = (demand.request_id, at)
            assert demand.due_s >= due_s.get(seen, -math.inf) - 1e-9
            assert demand.due_s <= end_s + deep_step_s
            due_s[seen] = demand.due_s
        return outputs

    timed.step = watched  # type: ignore[method-assign]

    timed.run(workload)


@pytest.mark.parametrize("exit_layer", EXITS)
@given(
    num_prompt=st.sampled_from([1, 30, 150]),
    max_tokens=st.integers(1, 40),
    stretch=st.floats(1.25, 5.0),
    kind=st.sampled_from(["latency_ms", "ttft_ms", "tpot_ms"]),
)
@settings(max_examples=examples(20), deadline=None)
def test_alone_on_a_steady_machine_what_is_promised_is_kept(
    exit_layer: int, num_prompt: int, max_tokens: int, stretch: float, kind: str
) -> None:
    prompt_s = MODEL.prefill_s(exit_layer, num_prompt)
    token_s = MODEL.small[0] + MODEL.small[1] * exit_layer + 1e-4
    limit_s = {
        "latency_ms": prompt_s + (max_tokens - 1) * token_s,
        "ttft_ms": prompt_s,
        "tpot_ms": token_s,
    }[kind]
    timed = make_timed()

    budget = {kind: limit_s * stretch * 1e3}
    timed.run([timed_request("0", num_prompt, max_tokens=max_tokens, **budget)])

    report = timed.reports["0"]
    assert report.met is True
    assert report.exit_layer >= exit_layer
