"""Law 13: whatever part fails, at whatever moment: every request ends once, and nothing is held.

Faults strike the model, the texts, the policy, the learner and the observer, at random moments
among arrivals, aborts, preemptions, changes of depth and deadlines, on an engine with few pages. An
answer that ends of its own accord is the one it would have been without any fault.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.core.budget import Budget
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.plan import StepPlan
from sortserve.core.request import FinishReason, Request, RequestOutput, RequestReport
from sortserve.core.sampling_params import RowFailure
from sortserve.engine.engine import Engine
from sortserve.simulation import Clock, Simulation, TimedRunner
from support.examples import examples
from support.launchers import LAUNCHERS
from support.scripted import (
    AsciiText,
    ScriptedRunner,
    add,
    go_shallower,
    make_engine,
    make_request,
    run,
)
from support.serving import serve
from support.timed import MODEL
from support.tiny_models import make_tiny_checkpoint

EXITS = (2, 4, 6)
BUDGETS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"latency_ms": 50, "on_miss": "truncate"},
    {"latency_ms": 5, "on_miss": "reject"},
    {"latency_ms": 200},
    {"ttft_ms": 20, "on_miss": "reject"},
    {"tpot_ms": 5},
)


class Fault(RuntimeError):
    """Scripted."""


class Chaos:
    """Decides when something fails."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.probability = 0.0

    def strikes(self, share: float = 1.0) -> bool:
        return self.rng.random() < share * self.probability

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, that fails now and then."""

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if self.strikes():
                raise Fault
            return function(*args, **kwargs)

        return faulty


class ChaosRunner(TimedRunner):
    """Fails before a step, in the middle of its rows, and row by row."""

    def __init__(self, chaos: Chaos, clock: Clock, num_pages: int) -> None:
        super().__init__(ScriptedRunner(num_pages=num_pages), clock, MODEL)
        self.chaos = chaos
        self.guilty: dict[str, str] = {}

    def execute(self, plan: StepPlan) -> list[Any]:
        faults = [self.guilty.get(row.request_id) for row in plan.rows]
        if "raises" in faults or self.chaos.strikes():
            raise self.chaos.rng.choice([Fault(), MemoryError(), AssertionError()])
        if self.chaos.strikes(0.5):  # some rows have written their keys and values
            super().execute(replace(plan, rows=plan.rows[: len(plan.rows) // 2 + 1]))
            raise Fault
        results: list[Any] = list(super().execute(plan))
        names = [row.request_id for row in plan.rows if row.sampling is not None]
        for i, name in enumerate(names):
            if self.guilty.get(name) == "not finite" or self.chaos.strikes(0.25):
                results[i] = RowFailure("non_finite")
        return results[:-1] if self.chaos.strikes(0.25) else results


class Observed:
    """Counts the requests that ended; fails now and then after that."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos
        self.finished: Counter[str] = Counter()

    def on_step(self, record: object) -> None:
        self._maybe_fail()

    def on_finished(self, report: RequestReport) -> None:
        self.finished[report.request_id] += 1
        self._maybe_fail()

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        self._maybe_fail()

    def on_forecast_failed(self) -> None:
        self._maybe_fail()

    def on_probe_step(self) -> None:
        self._maybe_fail()

    def _maybe_fail(self) -> None:
        if self.chaos.strikes():
            raise Fault


class Storm:
    """One engine, what has been asked of it, and what came back."""

    def __init__(
        self, seed: int, policy: str, num_pages: int, caching: bool, launcher: str | None
    ) -> None:
        self.chaos = Chaos(seed)
        self.rng = self.chaos.rng
        self.clock = Clock()
        self.runner = ChaosRunner(self.chaos, self.clock, num_pages)
        self.observed = Observed(self.chaos)
        self.texts: dict[str, AsciiText] = {}
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, RequestOutput] = {}
        self.engine: Engine = make_engine(
            exits=EXITS,
            runner=self.runner if launcher is None else LAUNCHERS[launcher](self.runner),
            async_scheduling=launcher is not None,
            clock=self.clock,
            observer=self.observed,
            policy=policy,
            enable_prefix_caching=caching,
            max_num_batched_tokens=self.rng.choice([4, 8, 64]),
            max_num_seqs=self.rng.choice([2, 5, 64]),
            make_text=self._make_text,
        )
        self.engine.costs.use(self.rng.choice([MODEL, MODEL, None]))
        self.simulation = Simulation(self.engine, self.clock)
        decisions = self.engine.scheduler._decisions
        names = ("cap", "choose", "lower", "entry_order", "victim")
        parts = {name: getattr(decisions.policy, name) for name in names}
        faulty: dict[str, Any] = {n: part and self.chaos.around(part) for n, part in parts.items()}
        decisions.policy = replace(decisions.policy, **faulty)

    def _make_text(self, request: Request) -> AsciiText:
        return self.texts.setdefault(request.request_id, AsciiText(request.sampling))

    def arrive(self, name: str) -> None:
        length = self.rng.choice([1, 3, 4, 5, 9, 17, 24])
        request = make_request(
            name,
            "abcdefgh" * 3 if self.rng.random() < 0.5 else "ab" * length,
            max_tokens=self.rng.choice([1, 2, 4, 12]),
            budget=Budget.from_mapping(self.rng.choice(BUDGETS)),
            arrival_s=self.clock.now,
            stop=self.rng.choice([(), ("de",)]),
        )
        self.simulation.arrive(request)
        if name in self.simulation.refusals:
            return
        self.requests[name], self.tokens[name] = request, []
        fate = self.rng.choice(["raises", "not finite", "push", "finish", *[None] * 8])
        if fate in ("push", "finish"):
            setattr(self.texts[name], fate, lambda *args: 1 / 0)
            self.runner.guilty[name] = "text"
        elif fate is not None:
            self.runner.guilty[name] = fate

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.ends, "an output after the last"
            self.tokens[output.request_id] += [token.token_id for token in output.tokens]
            if output.finish_reason is not None or output.error is not None:
                self.ends[output.request_id] = output

    def disturb(self) -> None:
        """Abort, preempt, lower or delay somebody."""
        sequences = list(self.engine.scheduler.sequences())
        if not sequences:
            return
        sequence, kind = self.rng.choice(sequences), self.rng.randrange(4)
        if kind == 0:
            output = self.engine.abort(sequence.request_id)
            assert output is not None
            self.take([output])
        elif kind == 1 and sequence in self.engine.scheduler._running:
            self.engine.scheduler.preempt(sequence)
        elif kind == 2 and sequence.exit_layer > EXITS[0] and not sequence.num_unknown_tokens:
            go_shallower(self.engine, sequence.request_id, EXITS[0])
        elif kind == 3:
            self.clock.now += self.rng.choice([0.001, 0.05])

    def blow(self, num_requests: int) -> None:
        names = iter([f"r{i}" for i in range(num_requests)])
        is_over = False
        for _ in range(3000):
            self.chaos.probability = 0.0 if is_over else self.rng.choice([0.0, 0.0, 0.1, 0.4])
            action = self.rng.random()
            if action < 0.3:
                name = next(names, None)
                is_over = name is None
                if name is not None:
                    self.arrive(name)
            elif action < 0.45:
                self.disturb()
            else:
                self.take(self.engine.step())
                self.engine.check_health()
            self.engine.check_invariants()
            if is_over and not self.engine.has_work:
                return
        raise AssertionError("work is left")


@settings(max_examples=examples(200), deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["deadline", "deadline", "fair"]),
    st.sampled_from([30, 45, 600]),
    st.booleans(),
    st.integers(1, 12),
    st.sampled_from([None, "early", "late"]),
)
def test_whatever_fails_every_request_ends_once_and_nothing_is_held(
    seed: int,
    policy: str,
    num_pages: int,
    caching: bool,
    num_requests: int,
    launcher: str | None,
) -> None:
    storm = Storm(seed, policy, num_pages, caching, launcher)

    storm.blow(num_requests)

    assert storm.ends.keys() == storm.requests.keys()
    assert storm.engine.kv_cache.pool.num_used == 0
    for name, end in storm.ends.items():
        assert storm.observed.finished[name] == (not isinstance(end.error, BudgetUnattainableError))
        first = storm.requests[name].prompt_token_ids[-1] + 1
        assert storm.tokens[name] == list(range(first, first + len(storm.tokens[name])))
        if end.finish_reason is FinishReason.LENGTH:
            assert len(storm.tokens[name]) == storm.requests[name].sampling.max_tokens
        if end.finish_reason in (FinishReason.LENGTH, FinishReason.STOP):
            assert name not in storm.runner.guilty


# ---- a real model ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("law13"), "llama-tied", exits=EXITS)


@contextmanager
def faults_of(engine: Engine, chaos: Chaos) -> Iterator[None]:
    """The model's steps fail before and after they have written, the more so the more rows."""
    runner = engine.runner
    execute = runner.execute

    def faulty(plan: StepPlan) -> Any:
        if len(plan.rows) > 1 and chaos.strikes():
            raise Fault
        results = execute(plan)
        if len(plan.rows) > 1 and chaos.strikes():
            raise Fault
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "execute", faulty)
        yield


PREFIX = list(range(40, 52))
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.1, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2},
)


@settings(max_examples=examples(12), deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([27, 60, 300]), st.sampled_from([5, 16]))
def test_rows_that_are_run_again_get_the_tokens_that_they_get_alone(
    tiny: Path, seed: int, num_pages: int, chunk: int
) -> None:
    """Also those that share the pages of a prefix with a row of the same step."""
    served, rng = serve(tiny), random.Random(seed)
    requests = [
        make_request(
            f"r{i}",
            PREFIX[: rng.choice([0, 4, 8, 12])]
            + [rng.randrange(3, 60) for _ in range(rng.randint(1, 6))],
            max_tokens=rng.randint(1, 6),
            ignore_eos=True,
            **rng.choice(SAMPLING),
        )
        for i in range(6)
    ]
    depths = [rng.choice(EXITS) for _ in requests]

    def answers(engine: Engine, chosen: list[int]) -> dict[str, list[int]]:
        for i in chosen:
            add(engine, requests[i], depths[i])
        return {name: result.token_ids for name, result in run(engine).items()}

    alone: dict[str, list[int]] = {}
    for i in range(len(requests)):
        alone |= answers(served.engine(num_pages=300), [i])
    chaos = Chaos(seed)
    chaos.probability = 0.5
    engine = served.engine(num_pages=num_pages, max_num_batched_tokens=chunk)
    with faults_of(engine, chaos):
        together = answers(engine, list(range(len(requests))))

    assert together == alone
