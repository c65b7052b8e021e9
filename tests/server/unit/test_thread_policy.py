"""The number of threads follows what the machine gives, at a bounded price."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from sortserve.cost.learner import CostLearner
from sortserve.cost.model import RowShape, StepShape
from sortserve.engine.thread_policy import ThreadPolicy

Speeds = Mapping[int, float]
"""Seconds of a step, by its number of threads."""

ALONE: Speeds = {4: 0.004, 2: 0.006, 1: 0.010}
BUSY: Speeds = {4: 0.050, 2: 0.030, 1: 0.012}
HALF_BUSY: Speeds = {4: 0.012, 2: 0.008, 1: 0.011}


class Machine:
    """Runs steps by a policy under a clock of its own; the expected time never changes."""

    def __init__(self, most: int, noise: float = 0.0) -> None:
        self.policy = ThreadPolicy(most)
        self.now = 0.0
        self.used: list[int] = []
        self._noise = noise
        self._random = random.Random(0)

    def run(self, speeds: Speeds, seconds: float) -> float:
        """Steps for so long; how many times the best fixed number's time they took, in the mean."""
        end, times = self.now + seconds, []
        while self.now < end:
            num_threads = self.policy.num_threads
            step_s = speeds[num_threads] * self._random.lognormvariate(0.0, self._noise)
            self.now += step_s
            self.policy.observe(step_s / 0.004, step_s, self.now)
            self.used.append(num_threads)
            times.append(step_s)
        return sum(times) / len(times) / min(speeds.values())


def test_it_begins_with_all_threads() -> None:
    assert ThreadPolicy(8).num_threads == 8


def test_with_one_thread_there_is_nothing_to_choose() -> None:
    machine = Machine(1)
    machine.run(ALONE, 5.0)
    assert set(machine.used) == {1}


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        pytest.param(ALONE, 4, id="alone"),
        pytest.param(BUSY, 1, id="busy"),
        pytest.param(HALF_BUSY, 2, id="half-busy"),
    ],
)
def test_it_finds_the_best_number_and_stays_there(speeds: Speeds, best: int, noise: float) -> None:
    machine = Machine(4, noise)
    machine.run(speeds, 30.0)
    assert machine.policy.settled == best
    machine.used.clear()
    assert machine.run(speeds, 60.0) < 1.05 * (1 + noise / 3)
    assert machine.used.count(best) > 0.9 * len(machine.used)


def test_a_load_that_comes_is_answered_within_seconds_and_so_is_its_end() -> None:
    machine = Machine(4)
    machine.run(ALONE, 60.0)
    machine.run(BUSY, 5.0)
    assert machine.policy.settled == 1
    machine.run(BUSY, 60.0)
    machine.run(ALONE, 15.0)
    assert machine.policy.settled == 4


def test_trials_cost_little_even_where_they_are_much_slower() -> None:
    machine = Machine(4)
    machine.run(BUSY, 20.0)
    assert machine.run(BUSY, 120.0) < 1.03


def test_a_difference_within_the_hysteresis_changes_nothing() -> None:
    machine = Machine(2)
    machine.run({2: 0.010, 1: 0.0095}, 60.0)
    assert machine.policy.settled == 2


def test_noise_alone_rarely_changes_the_number() -> None:
    machine = Machine(2, noise=0.2)
    settled = []
    for _ in range(120):
        machine.run({2: 0.010, 1: 0.012}, 1.0)
        settled.append(machine.policy.settled)
    assert settled.count(2) > 0.9 * len(settled)


def test_the_cost_model_that_learns_beside_it_stays_true_and_leads_it_to_the_same_number() -> None:
    """The expected times are the learner's own, which move with the number of threads."""
    shape = StepShape.of([RowShape(exit_layer=30, num_tokens=1, context_len=200, samples=True)] * 4)
    policy, learner = ThreadPolicy(4), CostLearner([(shape, ALONE[4])] * 20)
    now, errors = 0.0, []
    for speeds, best, until_s in [(ALONE, 4, 15.0), (BUSY, 1, 35.0), (ALONE, 4, 65.0)]:
        while now < until_s:
            predicted_s, step_s = learner.model.step_s(shape), speeds[policy.num_threads]
            now += step_s
            policy.observe(step_s / predicted_s, step_s, now)
            learner.observe(shape, step_s)
            if until_s - now < 10.0:  # well after the change
                errors.append(abs(predicted_s / step_s - 1))
        assert policy.settled == best
        assert learner.model.safety < 1.3
    assert sorted(errors)[int(0.9 * len(errors))] < 0.15
