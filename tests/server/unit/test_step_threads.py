"""Steps run with as many threads as the policy says, and it hears what they took."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.cost.costs import Costs
from sortserve.cost.model import CostModel, RowShape, StepShape
from sortserve.engine.threads import StepThreads
from support.scripted import FakeClock

ROW = RowPlan(
    request_id="r",
    exit_layer=6,
    start=0,
    token_ids=[1],
    block_table_SB=np.zeros((2, 1), dtype=np.int32),
    sampling=None,
)
PLAN = StepPlan(rows=(ROW,), depth_cap=6)
SHAPE = StepShape.of([RowShape(exit_layer=6, num_tokens=1, context_len=1, samples=False)])
PROMPT = StepPlan(rows=(replace(ROW, token_ids=[1] * 400),), depth_cap=6)
PROMPT_SHAPE = StepShape.of(
    [RowShape(exit_layer=6, num_tokens=400, context_len=400, samples=False)]
)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class BusyMachine:
    """Two threads take three times as long as one; keeps the number that each step had."""

    def __init__(self) -> None:
        self.now = 0.0
        self.used: list[int] = []

    def clock(self) -> float:
        return self.now

    def execute(self, plan: StepPlan) -> StepPlan:
        self.used.append(torch.get_num_threads())
        self.now += 0.03 if self.used[-1] == 2 else 0.01
        return plan


class MemoryBoundMachine:
    """A second thread slows rows that decode down a little, and halves the time of prompts."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[tuple[int, int]] = []
        """Tokens and threads of each."""

    def clock(self) -> float:
        return self.now

    def execute(self, plan: StepPlan) -> StepPlan:
        num_threads = torch.get_num_threads()
        self.steps.append((plan.num_tokens, num_threads))
        if plan.num_tokens == 1:
            self.now += 0.01 if num_threads == 1 else 0.012
        else:
            self.now += 0.3 if num_threads == 2 else 0.6
        return plan


def test_on_a_busy_machine_steps_come_to_use_one_thread_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine, costs = BusyMachine(), Costs()
    costs.use(CostModel.fit([(SHAPE, 0.01)]))
    threads = StepThreads(costs, machine.clock)

    with caplog.at_level(logging.INFO, logger="sortserve"):
        for _ in range(200):
            assert threads.run(PLAN, machine.execute) is PLAN

    assert machine.used[0] == 2
    assert machine.used[-100:].count(1) > 95
    assert "small steps use 1 threads now, 2 before" in caplog.text


def test_steps_that_gain_nothing_from_a_thread_do_not_take_it_from_prompts() -> None:
    machine, costs = MemoryBoundMachine(), Costs()
    costs.use(CostModel.fit([(SHAPE, 0.01), (PROMPT_SHAPE, 0.3)]))
    threads = StepThreads(costs, machine.clock)

    for i in range(600):
        threads.run(PROMPT if i % 4 == 0 else PLAN, machine.execute)

    late = machine.steps[-200:]
    assert [n for tokens, n in late if tokens == 1].count(1) > 110
    assert [n for tokens, n in late if tokens == 400].count(2) > 45


def test_without_a_cost_model_the_number_of_threads_stays() -> None:
    machine = BusyMachine()
    threads = StepThreads(Costs(), machine.clock)
    for _ in range(200):
        threads.run(PLAN, machine.execute)
    assert set(machine.used) == {2}


def test_a_step_that_raises_is_not_learned_from() -> None:
    costs = Costs()
    costs.use(CostModel.fit([(SHAPE, 0.01)]))
    threads = StepThreads(costs, FakeClock())

    def fail(plan: StepPlan) -> None:
        raise RuntimeError("a step that fails")

    for _ in range(200):
        with pytest.raises(RuntimeError, match="a step that fails"):
            threads.run(PLAN, fail)
    assert torch.get_num_threads() == 2
