"""An engine whose steps take time: a scripted model, a clock that each step moves, a cost model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sortserve.admission.choose import ExitChoice
from sortserve.admission.desk import AdmissionDesk
from sortserve.core.budget import Budget
from sortserve.core.errors import BudgetUnattainableError
from sortserve.core.plan import Runner, StepPlan
from sortserve.core.request import GenerationRequest, RequestReport
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.cost.model import CostModel, Line, step_shape
from sortserve.engine.engine import Engine
from sortserve.scheduling.demand import Demand, StepCosts
from support.scripted import (
    Collected,
    FakeClock,
    ScriptedRunner,
    collect,
    make_engine,
    make_request,
)

LINE: Line = (1e-3, 1e-3, 1e-5, 1e-8, 1e-5)
"""A step takes a millisecond, one more a layer, and little for each token."""
MODEL = CostModel(LINE, LINE, safety=1.1)
COSTS = StepCosts(replace(MODEL, safety=1.0))


class TimedRunner(ScriptedRunner):
    """Moves the clock by what a step costs, times some noise."""

    def __init__(
        self,
        clock: FakeClock,
        *,
        noise: Callable[[], float] = lambda: 1.0,
        num_pages: int = 4096,
        slab_size: int = 2,
    ) -> None:
        super().__init__(num_pages=num_pages, slab_size=slab_size)
        self._clock = clock
        self._noise = noise

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        self._clock.now += MODEL.step_s(step_shape(plan)) * self._noise()
        return super().execute(plan)


class TimedModel:
    """A real model whose steps move the clock by what a cost model says."""

    def __init__(self, runner: Runner, clock: FakeClock, truth: CostModel) -> None:
        self.num_pages, self.block_size = runner.num_pages, runner.block_size
        self.slab_size = runner.slab_size
        self.plans: list[StepPlan] = []
        self._runner, self._clock, self._truth = runner, clock, truth

    def execute(self, plan: StepPlan) -> Sequence[SampledToken | RowFailure]:
        self.plans.append(plan)
        self._clock.now += self._truth.step_s(step_shape(plan))
        return self._runner.execute(plan)


@dataclass
class Timed:
    """A server without threads: requests arrive at their times, one step follows the other."""

    engine: Engine
    runner: TimedRunner | TimedModel
    clock: FakeClock
    desk: AdmissionDesk
    choices: dict[str, ExitChoice] = field(default_factory=dict)
    refusals: dict[str, BudgetUnattainableError] = field(default_factory=dict)
    reports: dict[str, RequestReport] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    results: dict[str, Collected] = field(default_factory=dict)
    """The tokens of each request, and the exits that they were made at."""
    check_every: int = 16
    """Steps between two looks at all invariants."""
    _num_steps: int = 0

    def arrive(self, request: GenerationRequest) -> None:
        self.desk.see(self.engine.demands())
        try:
            choice = self.desk.choose(request, self.engine.validate(request))
        except BudgetUnattainableError as error:
            self.refusals[request.request_id] = error
            return
        self.choices[request.request_id] = choice
        self.engine.add_request(request, choice)

    def step(self) -> None:
        outputs = self.engine.step()
        collect(outputs, self.results)
        for output in outputs:
            if output.report is not None:
                self.reports[output.request_id] = output.report
            if output.error is not None:
                self.errors[output.request_id] = output.error
        self._num_steps += 1
        if self._num_steps % self.check_every == 0:
            self.engine.check_invariants()

    def run(self, arrivals: Sequence[GenerationRequest] = (), *, max_steps: int = 5000) -> None:
        queue = sorted(arrivals, key=lambda r: r.arrival_s)
        for _ in range(max_steps):
            if not self.engine.has_work:
                if not queue:
                    return
                self.clock.now = max(self.clock.now, queue[0].arrival_s)
            while queue and queue[0].arrival_s <= self.clock.now:
                self.arrive(queue.pop(0))
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps")


def make_timed(
    *,
    exits: tuple[int, ...] = (2, 4, 6),
    seed: int | None = None,
    num_pages: int = 800,
    slab_size: int = 2,
    overload_delay_s: float = 0.0,
    **config: Any,
) -> Timed:
    """A timed server; with a seed its steps are noisy."""
    clock, rng = FakeClock(now=0.0), random.Random(seed)
    noise = (lambda: 1.0) if seed is None else (lambda: rng.lognormvariate(0.0, 0.05))
    runner = TimedRunner(clock, noise=noise, num_pages=num_pages, slab_size=slab_size)
    engine = make_engine(
        exits=exits,
        runner=runner,
        clock=clock,
        enable_prefix_caching=False,
        overload_delay_s=overload_delay_s,
        **config,
    )
    engine.costs.use(MODEL)
    return Timed(engine, runner, clock, make_desk(engine))


def make_desk(engine: Engine) -> AdmissionDesk:
    """The desk that judges newcomers of an engine."""
    return AdmissionDesk(
        exits=engine.exits,
        policy=engine.policy,
        max_num_batched_tokens=engine.config.max_num_batched_tokens,
        overload_delay_s=engine.config.overload_delay_s,
        clock=engine.clock,
        expect=engine.expect,
        costs=engine.costs,
    )


def timed_request(
    request_id: str,
    prompt_tokens: int = 4,
    *,
    max_tokens: int = 10,
    at: float = 0.0,
    **budget: object,
) -> GenerationRequest:
    """A request of exact length; keyword arguments are its budget."""
    return make_request(
        request_id,
        "a" * prompt_tokens,
        max_tokens=max_tokens,
        arrival_s=at,
        budget=Budget.from_mapping(budget),
        ignore_eos=True,
    )


def make_demand(
    request_id: str = "r",
    exit_layer: int = 6,
    *,
    due_s: float | None = None,
    gap_s: float = 1.0,
    floor_layer: int = 2,
    num_pending: int = 1,
    context_len: int = 10,
    order: float = 0.0,
) -> Demand:
    """A demand; without ``due_s`` a soft one."""
    is_hard = due_s is not None
    return Demand(
        request_id=request_id,
        exit_layer=exit_layer,
        floor_layer=floor_layer,
        order=order,
        num_pending=num_pending,
        context_len=context_len if num_pending == 1 else 0,
        is_waiting=False,
        is_promised=is_hard,
        is_hard=is_hard,
        due_s=1e3 if due_s is None else due_s,
        gap_s=gap_s,
        end_s=1e3,
    )
