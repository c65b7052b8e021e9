"""Law 12: under `deadline`, with promises and lowerings, every token is the offline one.

A real tiny model, fp32, whose steps move a fake clock. What the server believes of its steps is not
what they take, so promises are made, fall behind, and requests go shallower in flight, in batches
of all depths and budgets. Each answer must equal what transformers gives alone at the same exits,
token by token.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.core.budget import Budget
from sortserve.core.request import Request
from sortserve.cost.model import CostModel, Line
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.objective import Worth
from sortserve.scheduling.policies.deadline import DEADLINE
from sortserve.scheduling.policies.table import POLICIES
from sortserve.scheduling.policy import Lowering
from support.examples import examples
from support.scripted import make_request
from support.serving import Served, offline_tokens, serve
from support.timed import Timed
from support.tiny_models import VOCAB_SIZE, make_tiny_checkpoint, mixed_kinds

EXITS = (1, 2, 4, 5, 6)
PREFIX = list(range(40, 64))
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11}
NO_LINE: Line = (0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("law12")
    return serve(
        make_tiny_checkpoint(
            folder, "qwen3-untied", exits=EXITS, exit_kinds=mixed_kinds(EXITS, "qwen3-untied")
        )
    )


@st.composite
def models(draw: st.DrawFn) -> CostModel:
    """Steps of 2 to 20 ms at full depth, dear or cheap in tokens; one line may be of nothing."""
    small, large = (
        (
            draw(st.floats(0.0, 3e-3)),
            draw(st.floats(2e-4, 3e-3)),
            draw(st.sampled_from([0.0, 1e-6, 1e-4])),
            draw(st.sampled_from([0.0, 1e-7])),
            draw(st.sampled_from([0.0, 1e-4])),
        )
        for _ in range(2)
    )
    none = draw(st.sampled_from([None, None, None, "small", "large"]))
    return CostModel(
        small=NO_LINE if none == "small" else small,
        large=NO_LINE if none == "large" else large,
        safety=draw(st.sampled_from([1.05, 1.2])),
    )


@st.composite
def requests(draw: st.DrawFn, request_id: str, model: CostModel) -> Request:
    """A request, mostly with a budget that is near what the server believes to be possible."""
    prompt = PREFIX[: draw(st.integers(0, 24))] + draw(
        st.lists(st.integers(3, VOCAB_SIZE - 30), min_size=1, max_size=12)
    )
    max_tokens = draw(st.integers(1, 14))
    step_ms = 1e3 * StepCosts(model).decode_s(EXITS[-1], 30)
    prompt_ms = 1e3 * model.prefill_s(EXITS[-1], len(prompt))
    possible_ms = {
        "latency_ms": prompt_ms + max_tokens * step_ms,
        "ttft_ms": prompt_ms,
        "tpot_ms": step_ms,
    }
    budget: dict[str, Any] = {}
    if kind := draw(st.sampled_from([None, "latency_ms", "latency_ms", "tpot_ms", "ttft_ms"])):
        stretch = draw(st.sampled_from([0.6, 1.2, 1.4, 1.7, 4.0]))
        budget[kind] = max(stretch * possible_ms[kind], 1e-3)
    depth = draw(st.sampled_from(["none", "none", "none", "min_exit_layer", "schedule"]))
    if depth == "min_exit_layer":
        budget["min_exit_layer"] = draw(st.sampled_from(EXITS))
    elif depth == "schedule":
        budget["schedule"] = [[0, 6], [draw(st.integers(1, 5)), 4], [draw(st.integers(6, 9)), 2]]
    budget["on_miss"] = draw(st.sampled_from(["degrade", "degrade", "truncate", "reject"]))
    return make_request(
        request_id,
        prompt,
        max_tokens=max_tokens,
        budget=Budget.from_mapping(budget),
        arrival_s=draw(st.sampled_from([0.0, 0.0, 0.004, 0.03])),
        ignore_eos=True,
        **draw(st.sampled_from([GREEDY, SEEDED])),
    )


@st.composite
def workloads(draw: st.DrawFn) -> tuple[CostModel, list[Request]]:
    """What the server believes of its steps, and what it is asked."""
    model = draw(models())
    return model, [draw(requests(str(i), model)) for i in range(draw(st.integers(3, 7)))]


def slower(model: CostModel, times: float) -> CostModel:
    """A model of the same machine when other work runs beside it."""
    small, large = (tuple(times * c for c in line) for line in (model.small, model.large))
    return CostModel(small, large)  # type: ignore[arg-type]


def check_tokens(served: Served, timed: Timed, request: Request) -> None:
    """All tokens as offline at the exits that the stream said, and the report says no other."""
    report, result = timed.reports[request.request_id], timed.results[request.request_id]
    schedule = request.budget.schedule
    if schedule is None:
        assert set(result.exits) <= set(timed.engine.exits.allowed(request.budget))
    else:
        places = [schedule.exit_at(k) for k in range(len(result.exits))]
        assert all(e <= place for e, place in zip(result.exits, places, strict=True))
        assert min(result.exits, default=6) >= schedule.exits[0]
        assert request.budget.has_latency or result.exits == places
    assert result.exits == sorted(result.exits, reverse=True), "nobody goes deeper again"
    assert dict(report.tokens_by_exit) == Counter(result.exits)
    if report.finish_reason == "length":
        assert len(result.token_ids) == request.sampling.max_tokens
    expected = offline_tokens(
        served.path,
        request.prompt_token_ids,
        request.sampling,
        result.exits,
        eos_token_ids=served.tokenizer.eos_token_ids,
        guess=result.token_ids,
    )
    assert result.token_ids == expected


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> str:
    """``deadline``, but everybody goes down an exit every few tokens, where their budgets allow."""

    def lower(
        demands: Sequence[Demand],
        exits: Sequence[int],
        costs: StepCosts,
        now: float,
        worth: Worth,
    ) -> list[Lowering]:
        assert DEADLINE.lower is not None
        found = dict(DEADLINE.lower(demands, exits, costs, now, worth))
        for d in demands:
            below = [e for e in exits if d.floor_layer <= e < d.exit_layer]
            if below and d.num_done % 5 == 4:
                found[d.request_id] = below[-1]
        return list(found.items())

    policy = dataclasses.replace(DEADLINE, name="restless", lower=lower)
    monkeypatch.setitem(POLICIES, policy.name, policy)
    return policy.name


def test_law_12_every_token_under_deadline_is_the_offline_one_at_its_exit(
    served: Served, restless: str
) -> None:
    seen: Counter[str] = Counter()

    @given(
        asked=workloads(),
        slowness=st.sampled_from([0.7, 1.0, 1.3, 3.0]),
        num_pages=st.sampled_from([110, 150, 600]),
        chunk=st.sampled_from([8, 256]),
        caching=st.booleans(),
        overload_degrade=st.booleans(),
        policy=st.sampled_from(["deadline", restless]),
        launcher=st.sampled_from([None, "early", "late"]),
    )
    @settings(max_examples=examples(20), deadline=None)
    def check(
        asked: tuple[CostModel, list[Request]],
        slowness: float,
        num_pages: int,
        chunk: int,
        caching: bool,
        overload_degrade: bool,
        policy: str,
        launcher: str | None,
    ) -> None:
        believed, workload = asked
        timed = served.timed(
            truth=slower(believed, slowness),
            believed=believed,
            num_pages=num_pages,
            policy=policy,
            launcher=launcher,
            max_num_batched_tokens=chunk,
            max_num_seqs=5,
            enable_prefix_caching=caching,
            overload_degrade=overload_degrade,
        )
        timed.check_every = 1

        timed.run(workload)

        assert set(timed.reports) | set(timed.refusals) == {r.request_id for r in workload}
        for request in workload:
            if request.request_id in timed.reports and request.request_id not in timed.errors:
                check_tokens(served, timed, request)
        assert timed.engine.stats().kv_pages_used == 0
        count(timed)

    def count(timed: Timed) -> None:
        for plan in timed.runner.plans:
            assert not plan.policy_failed
            seen["steps"] += 1
            seen["mixed depths"] += len({row.exit_layer for row in plan.rows}) > 1
            seen["preempted"] += plan.num_preemptions
            seen.update(reason for _, _, reason in plan.exit_changes)
        results = timed.results.values()
        seen["promised"] += sum(c.promise is not None for c in timed.choices.values())
        seen["two depths in one answer"] += sum(len(set(r.exits)) > 1 for r in results)

    check()

    for kind in ("promised", "mixed depths", "behind", "schedule"):
        assert seen[kind] > 0, f"the workloads never showed: {kind}"


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_law_12_holds_for_those_who_were_promised_a_time_and_those_who_make_room(
    served: Served, restless: str, sampling: dict[str, Any]
) -> None:
    """On a machine that takes half as long again as believed; soft requests are taken down, too."""
    believed = CostModel((1e-3, 1e-3, 1e-5, 1e-8, 1e-5), (1e-3, 1e-3, 1e-5, 1e-8, 1e-5), safety=1.1)
    budgets: list[dict[str, Any]] = [{"latency_ms": 220}, {}, {}, {"latency_ms": 300}]
    workload = [
        make_request(
            str(i),
            [*PREFIX[: 4 * i], 100 + i],
            max_tokens=24,
            budget=Budget.from_mapping(budget),
            arrival_s=0.01 * i,
            ignore_eos=True,
            **sampling,
        )
        for i, budget in enumerate(budgets)
    ]
    timed = served.timed(
        truth=slower(believed, 1.5), believed=believed, policy=restless, overload_degrade=True
    )

    timed.run(workload)

    changes = Counter(reason for p in timed.runner.plans for _, _, reason in p.exit_changes)
    assert changes["behind"] > 0
    if sampling is GREEDY:
        assert changes["unpromised"] > 0
    else:
        assert all(len(set(timed.results[i].exits)) == 1 for i in "12"), "seeded ones keep one exit"
    assert len(timed.reports) == len(workload)
    for request in workload:
        check_tokens(served, timed, request)
    assert max(len(set(result.exits)) for result in timed.results.values()) > 1
