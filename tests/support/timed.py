"""An engine whose steps take time: a scripted model, a clock that each step moves, a cost model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sortserve.core.budget import Budget
from sortserve.core.plan import Pending, Runner, StepPlan
from sortserve.core.request import Request, RequestOutput
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.cost.model import CostModel, Line, step_shape
from sortserve.engine.engine import Engine
from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.simulation import Clock, Simulation, TimedRunner
from support.scripted import (
    Collected,
    Rule,
    ScriptedRunner,
    collect,
    make_engine,
    make_request,
    next_letter,
)

LINE: Line = (1e-3, 1e-3, 1e-5, 1e-8, 1e-5)
"""A step takes a millisecond, one more a layer, and little for each token."""
MODEL = CostModel(LINE, LINE, safety=1.1)
COSTS = StepCosts(replace(MODEL, safety=1.0))
MAX_STEPS = 5000


class RecordingRunner(TimedRunner):
    """Keeps the plans whose time has passed."""

    def __init__(
        self, runner: Runner, clock: Clock, truth: CostModel, **noise: Callable[[], float]
    ) -> None:
        super().__init__(runner, clock, truth, **noise)
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> Sequence[SampledToken | RowFailure]:
        self.plans.append(plan)
        return super().execute(plan)


class TimedLauncher(TimedRunner):
    """Runs a plan once the one launched before it is over, while the host goes on."""

    _over_s = 0.0

    def launch(self, plan: StepPlan) -> Pending:
        begins_s = max(self._over_s, self._clock.now)
        self._over_s = begins_s + self._truth.step_s(step_shape(plan)) * self._noise()
        return _OnItsWay(self._runner.execute(plan), self._clock, self._over_s)

    def execute(self, plan: StepPlan) -> Sequence[SampledToken | RowFailure]:
        return self.launch(plan).result()


@dataclass
class _OnItsWay:
    results: Sequence[SampledToken | RowFailure]
    clock: Clock
    over_s: float

    def result(self) -> Sequence[SampledToken | RowFailure]:
        self.clock.now = max(self.clock.now, self.over_s)
        return self.results


class Timed(Simulation):
    """A simulation whose tokens and plans are kept, and whose invariants are looked at."""

    def __init__(self, engine: Engine, runner: RecordingRunner, clock: Clock) -> None:
        super().__init__(engine, clock)
        self.runner = runner
        self.results: dict[str, Collected] = {}
        """The tokens of each request, and the exits that they were made at."""
        self.check_every = 16
        """Steps between two looks at all invariants."""
        self._num_steps = 0

    def step(self) -> list[RequestOutput]:
        outputs = super().step()
        collect(outputs, self.results)
        self._num_steps += 1
        assert self._num_steps <= MAX_STEPS, "work is left"
        if self._num_steps % self.check_every == 0:
            self.engine.check_invariants()
        return outputs


def make_timed(
    *,
    exits: tuple[int, ...] = (2, 4, 6),
    seed: int | None = None,
    num_pages: int = 800,
    slab_size: int = 2,
    rule: Rule = next_letter,
    overload_delay_s: float = 0.0,
    enable_prefix_caching: bool = False,
    **config: Any,
) -> Timed:
    """A timed server; with a seed its steps are noisy."""
    clock, rng = Clock(), random.Random(seed)
    noise = (lambda: 1.0) if seed is None else (lambda: rng.lognormvariate(0.0, 0.05))
    scripted = ScriptedRunner(num_pages=num_pages, slab_size=slab_size, rule=rule)
    runner = RecordingRunner(scripted, clock, MODEL, noise=noise)
    engine = make_engine(
        exits=exits,
        runner=runner,
        clock=clock,
        enable_prefix_caching=enable_prefix_caching,
        overload_delay_s=overload_delay_s,
        **config,
    )
    engine.costs.use(MODEL)
    return Timed(engine, runner, clock)


def timed_request(
    request_id: str,
    prompt_tokens: int = 4,
    *,
    max_tokens: int = 10,
    at: float = 0.0,
    **budget: object,
) -> Request:
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
    gap_s: float | None = None,
    floor_layer: int = 2,
    num_pending: int = 1,
    context_len: int = 10,
    order: float = 0.0,
    num_left: int = 20,
) -> Demand:
    """A demand; without ``due_s`` a soft one.

    Its further tokens are due at the pace of the next, unless it is late or ``gap_s`` says so.
    """
    is_hard = due_s is not None
    if gap_s is None:
        gap_s = 1.0 if due_s is None or due_s <= 0.0 or num_pending > 1 else due_s
    end_s = math.inf if due_s is None else due_s + (num_left - 1) * gap_s
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
        end_s=end_s,
        num_left=num_left,
    )
