"""Law 15: a server that plans a step while one is under way gives what one gives that waits.

The scripted model asserts on every read that its pages hold what the sequence wrote, and each of
its tokens tells the depth it was made at. The launchers run a plan at the two extremes: before its
launch returns, and when its result is asked for, after the host has gone on.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.core.budget import Budget
from sortserve.core.errors import EngineError
from sortserve.core.plan import StepPlan
from sortserve.core.request import FinishReason, Request, StepRecord
from sortserve.core.sampling_params import SampledToken
from sortserve.core.schedule import DepthSchedule
from sortserve.cost.model import StepShape
from sortserve.engine.engine import Engine
from sortserve.scheduling.policies.table import POLICIES
from sortserve.simulation import Clock, TimedRunner
from support.examples import examples
from support.faults import FaultyRunner
from support.launchers import LAUNCHERS, EarlyLauncher, LateLauncher
from support.scripted import (
    Collected,
    ScriptedRunner,
    add,
    collect,
    depth_letter,
    make_engine,
    make_request,
    run,
)
from support.serving import Served, serve
from support.timed import MODEL
from support.tiny_models import VOCAB_SIZE, make_tiny_checkpoint

EXITS = (2, 4, 6)
EXTREMES = ["early", "late"]


def overlapping(launcher: str, runner: ScriptedRunner, **config: Any) -> Engine:
    return make_engine(runner=LAUNCHERS[launcher](runner), async_scheduling=True, **config)


# ---- a scripted model: every page is looked at ----

ENDS: list[dict[str, Any]] = [
    {},
    {},
    {"stop_token_ids": (ord("k"), ord("q"))},
    {"stop_token_ids": (ord("e"),), "min_tokens": 3},
    {"stop": ("q", "abc")},
    {"stop": ("ef",), "logprobs": 2},
    {"frequency_penalty": 0.5},
    {"stop_token_ids": (ord("n"),), "presence_penalty": 0.5},
]
PARTS = (((0, 6),), ((0, 6), (3, 2)), ((0, 6), (1, 4), (7, 2)), ((0, 4), (5, 2)))


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    """Requests of all depths and ends; prompts share prefixes often."""
    prompts = st.lists(st.sampled_from(["abcd", "abce", "zzzz", "q"]), min_size=1, max_size=6)
    requests = []
    for i in range(draw(st.integers(1, 10))):
        budget = draw(
            st.one_of(
                st.sampled_from(EXITS).map(lambda exit_layer: Budget(exit_layer=exit_layer)),
                st.sampled_from(PARTS).map(lambda parts: Budget(schedule=DepthSchedule(parts))),
            )
        )
        ends = draw(st.sampled_from(ENDS))
        requests.append(
            make_request(
                str(i),
                "".join(draw(prompts)),
                max_tokens=draw(st.integers(max(1, ends.get("min_tokens", 0)), 20)),
                budget=budget,
                **ends,
            )
        )
    return requests


def alone(request: Request) -> Collected:
    engine = make_engine(runner=ScriptedRunner(rule=depth_letter))
    add(engine, request)
    return run(engine)[request.request_id]


def play(engine: Engine, workload: list[Request], rng: random.Random) -> dict[str, Collected]:
    """Everybody's answers; they come at any time, some lose their pages and some are aborted."""
    results: dict[str, Collected] = {}
    waiting = list(workload)
    while waiting or engine.has_work:
        action = rng.random()
        live = list(engine.scheduler.sequences())
        if action < 0.3 and waiting:
            add(engine, waiting.pop(0))
        elif action < 0.4 and live:
            sequence = rng.choice(live)
            if sequence.num_computed_tokens:
                engine.scheduler.preempt(sequence)
        elif action < 0.43 and live:
            output = engine.abort(rng.choice(live).request_id)
            assert output is not None
            collect([output], results)
        else:
            collect(engine.step(), results)
        engine.check_invariants()
    return results


@given(
    workload=workloads(),
    launcher=st.sampled_from(EXTREMES),
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(sorted(POLICIES)),
    num_pages=st.sampled_from([36, 48, 512]),
    chunk=st.sampled_from([5, 16, 256]),
    caching=st.booleans(),
    max_num_seqs=st.sampled_from([1, 3, 5]),
)
@settings(max_examples=examples(100), deadline=None)
def test_overlap_changes_no_token_whatever_happens_around_it(
    workload: list[Request],
    launcher: str,
    seed: int,
    policy: str,
    num_pages: int,
    chunk: int,
    caching: bool,
    max_num_seqs: int,
) -> None:
    engine = overlapping(
        launcher,
        ScriptedRunner(num_pages=num_pages, rule=depth_letter),
        policy=policy,
        max_num_batched_tokens=chunk,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=caching,
    )

    results = play(engine, workload, random.Random(seed))

    for request in workload:
        result, expected = results[request.request_id], alone(request)
        assert result.last is not None
        assert expected.last is not None
        report = result.last.report
        assert report is not None
        assert report.num_output_tokens == len(result.token_ids)
        assert dict(report.tokens_by_exit) == Counter(result.exits)
        if result.last.finish_reason is FinishReason.ABORT:
            count = len(result.token_ids)
            assert result.token_ids == expected.token_ids[:count]
            assert result.exits == expected.exits[:count]
            continue
        assert (result.token_ids, result.exits) == (expected.token_ids, expected.exits)
        assert result.text == expected.text
        assert result.last.finish_reason == expected.last.finish_reason
    assert engine.stats().kv_pages_used == 0


class Observed:
    """Keeps the records of steps."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_finished(self, report: object) -> None: ...
    def on_rejected(self, reason: str, budget: object) -> None: ...
    def on_forecast_failed(self) -> None: ...
    def on_probe_step(self) -> None: ...


@pytest.mark.parametrize("launcher", [*EXTREMES, "thread"])
@pytest.mark.parametrize("ends", [{"stop_token_ids": (ord("d"),)}, {"stop": ("d",)}])
def test_who_ends_on_a_token_never_shows_or_bills_the_one_after_it(
    launcher: str, ends: dict[str, Any]
) -> None:
    runner, observed = ScriptedRunner(), Observed()
    engine = overlapping(launcher, runner, observer=observed)
    add(engine, make_request("r", "a", max_tokens=20, **ends))

    result = run(engine)["r"]

    assert [chr(token_id) for token_id in result.token_ids] == ["b", "c", "d"]
    assert result.text == "bc"
    assert result.last is not None
    assert result.last.report is not None
    assert result.last.finish_reason == "stop"
    assert result.last.report.num_output_tokens == 3
    assert len(runner.plans) == 4, "the step after the last token was under way"
    assert sum(n for record in observed.steps for n in record.tokens_by_exit.values()) == 3
    assert sum(len(record.ttfts) + len(record.itls) for record in observed.steps) == 3
    assert engine.stats().kv_pages_used == 0


def test_who_ends_by_length_has_no_row_too_many() -> None:
    runner = ScriptedRunner()
    engine = overlapping("late", runner)
    for name in "rst":
        add(engine, make_request(name, "a", max_tokens=5))

    run(engine)

    assert [len(plan.rows) for plan in runner.plans] == [3] * 5


def test_the_host_plans_while_a_step_is_under_way() -> None:
    runner = ScriptedRunner()
    engine = overlapping("late", runner)
    add(engine, make_request("r", "abc", max_tokens=4))

    assert engine.step() == [], "the first step has been launched, and nothing has been waited for"
    assert runner.plans == []
    results: dict[str, Collected] = {}
    collect(engine.step(), results)

    assert [chr(token_id) for token_id in results["r"].token_ids] == ["d"]
    assert len(runner.plans) == 1, "the second one is under way"
    collect_all(engine, results)
    assert [[row.token_from for row in plan.rows] for plan in plans_of(engine)] == [
        *([None], [0], [0], [0])
    ]


def plans_of(engine: Engine) -> list[StepPlan]:
    """What was launched."""
    assert isinstance(engine.runner, EarlyLauncher | LateLauncher)
    return engine.runner.plans


def collect_all(engine: Engine, results: dict[str, Collected]) -> None:
    while engine.has_work:
        collect(engine.step(), results)
        engine.check_invariants()


def test_rows_that_sit_a_step_out_and_rows_that_go_on_name_the_right_tokens() -> None:
    """Two depths under a policy that gives the shallow ones more steps than the deep ones."""
    engine = overlapping("late", ScriptedRunner(rule=depth_letter), policy="fair")
    for i in range(4):
        add(engine, make_request(str(i), "ab" * (1 + i), max_tokens=12), (2, 6)[i % 2])

    results = run(engine)

    for i in range(4):
        request = make_request(str(i), "ab" * (1 + i), max_tokens=12)
        lonely = make_engine(runner=ScriptedRunner(rule=depth_letter))
        add(lonely, request, (2, 6)[i % 2])
        assert results[str(i)].token_ids == run(lonely)[str(i)].token_ids
    plans = plans_of(engine)
    assert len({len(plan.rows) for plan in plans}) > 1
    assert any(row.token_from for plan in plans for row in plan.rows)


def test_a_row_whose_penalties_count_the_tokens_is_planned_when_they_are_known() -> None:
    engine = overlapping("late", ScriptedRunner())
    add(engine, make_request("p", "a", max_tokens=6, frequency_penalty=1.0))
    add(engine, make_request("q", "a", max_tokens=12))

    results = run(engine)

    assert len(results["p"].token_ids) == 6
    plans = plans_of(engine)
    with_p = [plan for plan in plans if any(row.request_id == "p" for row in plan.rows)]
    assert all(row.token_from is None for plan in with_p for row in plan.rows)
    assert any(row.token_from is not None for plan in plans for row in plan.rows)


# ---- failures ----


class Moody(ScriptedRunner):
    """Raises on the plans of some numbers, after their rows have been written."""

    def __init__(self, failing: set[int], *, num_pages: int = 512) -> None:
        super().__init__(rule=depth_letter, num_pages=num_pages)
        self.failing = failing
        self.num_calls = 0

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        self.num_calls += 1
        results = super().execute(plan)
        if self.num_calls - 1 in self.failing:
            raise RuntimeError("a scripted fault")
        return results


@given(
    workload=workloads(),
    launcher=st.sampled_from(EXTREMES),
    seed=st.integers(0, 2**32),
    failing=st.sets(st.integers(0, 40), max_size=6),
    num_pages=st.sampled_from([48, 512]),
    caching=st.booleans(),
)
@settings(max_examples=examples(60), deadline=None)
def test_a_step_that_fails_once_costs_time_and_nothing_else(
    workload: list[Request],
    launcher: str,
    seed: int,
    failing: set[int],
    num_pages: int,
    caching: bool,
) -> None:
    # A step that fails is run again two calls later: after the one that was launched behind it.
    failing = {n for n in failing if n - 1 not in failing and n - 2 not in failing}
    runner = Moody(failing, num_pages=num_pages)
    engine = overlapping(launcher, runner, enable_prefix_caching=caching, max_num_seqs=4)

    results = play(engine, workload, random.Random(seed))

    for request in workload:
        result, expected = results[request.request_id], alone(request)
        assert result.last is not None
        assert result.last.finish_reason is not FinishReason.ERROR
        count = len(result.token_ids)
        assert (result.token_ids, result.exits) == (
            expected.token_ids[:count],
            expected.exits[:count],
        )
        if result.last.finish_reason is not FinishReason.ABORT:
            assert count == len(expected.token_ids)
    assert engine.stats().kv_pages_used == 0


@pytest.mark.parametrize("launcher", EXTREMES)
@pytest.mark.parametrize("kind", ["raises", "not finite"])
def test_only_the_guilty_request_sees_a_failure(launcher: str, kind: str) -> None:
    runner, observed = FaultyRunner(), Observed()
    engine = overlapping(launcher, runner, observer=observed)
    for name in ("a", "b", "c"):
        add(engine, make_request(name, name, max_tokens=8))
    results: dict[str, Collected] = {}
    for _ in range(3):
        collect(engine.step(), results)

    (runner.guilty if kind == "raises" else runner.not_finite).add("b")
    collect_all(engine, results)

    assert results["b"].last is not None
    assert isinstance(results["b"].last.error, EngineError)
    assert 2 <= len(results["b"].token_ids) < 8
    for name in ("a", "c"):
        assert results[name].token_ids == [ord(name) + i for i in range(1, 9)]
    assert sum(sum(record.failed_rows.values()) for record in observed.steps) == 1
    assert engine.stats().kv_pages_used == 0


@pytest.mark.parametrize("launcher", EXTREMES)
def test_a_failed_step_is_not_learned_from_and_is_counted(launcher: str) -> None:
    observed = Observed()
    engine = overlapping(launcher, Moody({1}), observer=observed)
    add(engine, make_request("r", "a", max_tokens=6))

    run(engine)

    assert [record.was_retried for record in observed.steps] == [False, True, *[False] * 4]
    assert all(record.predicted_s is None for record in observed.steps if record.was_retried)


@pytest.mark.parametrize("launcher", EXTREMES)
def test_a_runner_that_is_broken_ends_the_engine(launcher: str) -> None:
    runner = FaultyRunner()
    engine = overlapping(launcher, runner, max_failed_steps=2)
    for i in range(6):
        add(engine, make_request(str(i), "abc", max_tokens=9))
        engine.step()
        engine.check_health()
    runner.is_broken = True

    results: dict[str, Collected] = {}
    for i in range(6, 12):
        add(engine, make_request(str(i), "abc", max_tokens=9))
        while engine.has_work and engine.failure is None:
            collect(engine.step(), results)
            engine.check_health()
            engine.check_invariants()

    assert engine.failure is not None


def test_a_plan_that_cannot_be_launched_fails_as_one_that_cannot_be_run() -> None:
    runner = ScriptedRunner()
    launcher = LAUNCHERS["late"](runner)
    engine = make_engine(runner=launcher, async_scheduling=True)
    add(engine, make_request("r", "a", max_tokens=6))
    engine.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "launch", lambda plan: 1 / 0)
        engine.step()

    assert [chr(i) for i in run(engine)["r"].token_ids] == ["c", "d", "e", "f", "g"]


# ---- times ----


def test_a_step_takes_the_time_from_the_result_before_it_to_its_own() -> None:
    """The host is slow: it needs half a millisecond between two steps, which overlap hides."""
    clock, observed = Clock(), Observed()
    runner = TimedRunner(ScriptedRunner(), clock, MODEL)
    engine = make_engine(
        runner=LAUNCHERS["late"](runner), async_scheduling=True, clock=clock, observer=observed
    )
    told: list[tuple[float, float | None]] = []
    engine.costs.use(MODEL)

    def observe(shape: StepShape, seconds: float, ended_s: float | None = None) -> None:
        told.append((seconds / MODEL.step_s(shape), ended_s))

    engine.costs.observe = observe  # type: ignore[method-assign]
    add(engine, make_request("r", "abc", max_tokens=6))
    landed: list[float] = []
    while engine.has_work:
        clock.now += 5e-4
        if engine.step():
            landed.append(clock.now)

    assert [now for _, now in told] == landed
    gaps = [later - earlier for earlier, later in itertools.pairwise(landed)]
    assert [record.duration_s for record in observed.steps[1:]] == pytest.approx(gaps)
    assert all(ratio >= 1.0 - 1e-9 for ratio, _ in told)


# ---- a real model ----


@pytest.fixture(name="served", scope="module")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("law15")
    kinds = {2: "norm", 4: "layer"}
    return serve(make_tiny_checkpoint(folder, "llama-tied", exits=EXITS, exit_kinds=kinds))


@st.composite
def specs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Requests of a real model with every way to sample, to end and to go shallower."""
    sampling: dict[str, st.SearchStrategy[Any]] = {
        "top_k": st.sampled_from([2, 40]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.just(0.05),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "frequency_penalty": st.just(0.7),
        "logit_bias": st.just({7: 4.0, 11: -3.0}),
        "min_tokens": st.sampled_from([2, 5]),
        "logprobs": st.sampled_from([0, 3]),
        "stop_token_ids": st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=40).map(tuple),
    }
    one = st.fixed_dictionaries(
        {
            "prefix": st.integers(0, 24),
            "suffix": st.lists(st.integers(3, VOCAB_SIZE - 30), min_size=1, max_size=12),
            "depth": st.sampled_from([2, 4, 6, ((0, 6), (3, 4), (6, 2))]),
            "sampling": st.fixed_dictionaries(
                {
                    "temperature": st.sampled_from([0.0, 0.8, 1.5]),
                    "seed": st.integers(0, 2**40),
                    "max_tokens": st.integers(5, 14),
                },
                optional=sampling,
            ),
        }
    )
    return draw(st.lists(one, min_size=2, max_size=7))


def request_of(number: int, spec: dict[str, Any]) -> Request:
    depth = spec["depth"]
    is_one = isinstance(depth, int)
    budget = Budget(exit_layer=depth) if is_one else Budget(schedule=DepthSchedule(depth))
    prompt = [*range(40, 40 + spec["prefix"]), *spec["suffix"]]
    return make_request(str(number), prompt, budget=budget, **spec["sampling"])


@given(
    workload=specs(),
    launcher=st.sampled_from(sorted(LAUNCHERS)),
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["fair", "lockstep", "deadline"]),
    num_pages=st.sampled_from([100, 200, 600]),  # the longest takes 91
    chunk=st.sampled_from([8, 256]),
    caching=st.booleans(),
)
@settings(max_examples=examples(20), deadline=None)
def test_with_a_real_model_tokens_and_logprobs_are_those_without_overlap(
    served: Served,
    workload: list[dict[str, Any]],
    launcher: str,
    seed: int,
    policy: str,
    num_pages: int,
    chunk: int,
    caching: bool,
) -> None:
    requests = [request_of(i, spec) for i, spec in enumerate(workload)]
    config: dict[str, Any] = {
        "num_pages": num_pages,
        "policy": policy,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": 4,
        "enable_prefix_caching": caching,
    }

    with_overlap = play(served.engine(launcher=launcher, **config), requests, random.Random(seed))

    engine = served.engine(num_pages=600, enable_prefix_caching=False)
    for request in requests:
        add(engine, request)
        expected = run(engine)[request.request_id]
        result = with_overlap[request.request_id]
        assert result.last is not None
        assert expected.last is not None
        count = len(result.token_ids)
        if result.last.finish_reason is not FinishReason.ABORT:
            assert result.last.finish_reason == expected.last.finish_reason
            assert count == len(expected.token_ids)
            assert result.text == expected.text
        assert result.tokens == expected.tokens[:count]
        assert result.exits == expected.exits[:count]
