"""A machine that becomes slower or faster at once: soon followed, whatever the traffic."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from sortserve.cost.changes import ChangeDetector
from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, RowShape, StepShape

CHANGE_S = 60.0
TRUE = CostModel(small=(1e-3, 4e-4, 2e-6, 1e-9, 5e-5), large=(2e-3, 4e-4, 9e-6, 1e-9, 5e-5))


def true_seconds(shape: StepShape) -> float:
    return TRUE.step_s(shape)


def learner() -> CostLearner:
    """Knows what a calibration measures."""
    shapes = [decode(e, n) for e in (9, 30) for n in (1, 8, 32)]
    shapes += [prompt(n, e) for e in (9, 30) for n in (64, 128, 512)]
    return CostLearner([(shape, true_seconds(shape)) for shape in shapes])


def decode(exit_layer: int, num_rows: int = 1) -> StepShape:
    return StepShape.of([RowShape(exit_layer, 1, 300, samples=True)] * num_rows)


def prompt(num_tokens: int, exit_layer: int = 30) -> StepShape:
    return StepShape.of([RowShape(exit_layer, num_tokens, num_tokens, samples=True)])


Step = tuple[float, StepShape]
"""The seconds since the step before, and what runs."""


def busy(rng: random.Random) -> Iterator[Step]:
    """Rows at all exits, and a prompt in every fifth step."""
    while True:
        yield 0.0, decode(rng.choice((9, 15, 30)), rng.randint(1, 12))
        if rng.random() < 0.2:
            yield 0.0, prompt(rng.choice((64, 300)))


def sparse(rng: random.Random) -> Iterator[Step]:
    """A short answer every other second."""
    while True:
        yield rng.uniform(1.0, 3.0), prompt(rng.randint(60, 300))
        for _ in range(20):
            yield 0.0, decode(30)


def probes(rng: random.Random) -> Iterator[Step]:
    """What runs while all are refused."""
    while True:
        yield 1.0, prompt(64, 9)
        yield 0.0, decode(9)
        yield 0.0, decode(9)


def errors(model: CostModel, speed: float) -> list[float]:
    shapes = [decode(9), decode(30), decode(30, 8), prompt(64), prompt(300)]
    return [model.step_s(s) / (speed * true_seconds(s)) for s in shapes]


def run(
    traffic: Callable[[random.Random], Iterator[Step]],
    speed: Callable[[float], float],
    *,
    noise: float,
    until_s: float,
    seed: int = 1,
) -> CostLearner:
    learned, rng, now = learner(), random.Random(seed), 0.0
    for idle_s, shape in traffic(rng):
        now += idle_s
        seconds = speed(now) * true_seconds(shape) * rng.lognormvariate(0.0, noise)
        now += seconds
        if now > until_s:
            break
        learned.observe(shape, seconds, now)
    return learned


@pytest.mark.parametrize("noise", [0.03, 0.15])
@pytest.mark.parametrize("speeds", [(1.0, 3.0), (3.0, 1.0), (1.0, 2.0), (5.0, 1.0)])
@pytest.mark.parametrize("traffic", [busy, sparse, probes])
def test_within_ten_seconds_all_steps_are_predicted_at_the_new_speed(
    traffic: Callable[[random.Random], Iterator[Step]], speeds: tuple[float, float], noise: float
) -> None:
    def speed(now: float) -> float:
        return speeds[now > CHANGE_S]

    learned = run(traffic, speed, noise=noise, until_s=CHANGE_S + 10.0)

    assert all(0.75 < ratio < 1.3 for ratio in errors(learned.model, speeds[1]))
    assert learned.model.safety <= 1.3


@pytest.mark.parametrize("noise", [0.03, 0.08, 0.15])
@pytest.mark.parametrize("traffic", [busy, sparse, probes])
def test_noise_alone_is_never_taken_for_a_change(
    traffic: Callable[[random.Random], Iterator[Step]],
    noise: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: list[object] = []
    monkeypatch.setattr(CostLearner, "_change_speed", lambda self, *args: changes.append(args))

    run(traffic, lambda now: 1.0, noise=noise, until_s=120.0)

    assert not changes


def test_after_a_change_the_safety_factor_is_the_default_until_enough_steps_have_run() -> None:
    def speed(now: float) -> float:
        return 1.0 if now < CHANGE_S else 3.0

    assert run(busy, speed, noise=0.01, until_s=CHANGE_S).model.safety < CostModel.safety
    after = run(probes, speed, noise=0.01, until_s=CHANGE_S + 5.0)

    assert after.model.safety == CostModel.safety


def test_the_other_regime_goes_with_the_one_that_shows_the_change() -> None:
    learned = learner()

    for i in range(40):
        learned.observe(decode(30), 3.0 * true_seconds(decode(30)), 0.1 * i)

    expected = 3.0 * true_seconds(prompt(300))
    assert learned.model.step_s(prompt(300)) == pytest.approx(expected, rel=0.1)


def test_who_went_along_with_a_change_also_comes_back_with_a_drift() -> None:
    """A neighbour on the machine begins at once, and ends little by little."""

    def alone(rng: random.Random) -> Iterator[Step]:
        while True:
            yield 0.0, decode(30)

    def speed(now: float) -> float:
        return 1.0 if now < CHANGE_S else max(1.0, 3.0 - (now - CHANGE_S) / 10.0)

    learned = run(alone, speed, noise=0.03, until_s=CHANGE_S + 40.0)

    assert all(0.8 < ratio < 1.3 for ratio in errors(learned.model, 1.0))


def test_a_regime_whose_own_steps_say_otherwise_stays() -> None:
    learned, now = learner(), 0.0

    for _ in range(40):
        learned.observe(decode(30), 3.0 * true_seconds(decode(30)), now)
        learned.observe(prompt(300), true_seconds(prompt(300)), now + 0.05)
        now += 0.1

    assert learned.model.step_s(decode(30)) > 2.5 * true_seconds(decode(30))
    expected = true_seconds(prompt(300))
    assert learned.model.step_s(prompt(300)) == pytest.approx(expected, rel=0.1)


def test_a_regime_that_went_along_in_vain_comes_back_alone() -> None:
    learned = learner()
    for i in range(40):
        learned.observe(decode(30), 3.0 * true_seconds(decode(30)), 0.1 * i)

    for i in range(6):
        learned.observe(prompt(300), true_seconds(prompt(300)), 10.0 + i)

    expected = true_seconds(prompt(300))
    assert learned.model.step_s(prompt(300)) == pytest.approx(expected, rel=0.2)
    assert learned.model.step_s(decode(30)) > 2.5 * true_seconds(decode(30))


# ---- what counts as a change ----


def alarms(errors: list[float], *, every_s: float) -> list[int]:
    detector = ChangeDetector()
    return [i for i, e in enumerate(errors) if detector.observe(e, i * every_s, 0.0) is not None]


def test_three_steps_over_two_seconds_at_twice_their_time_are_a_change() -> None:
    assert alarms([0.0, 0.7, 0.7, 0.7], every_s=1.0) == [3]
    assert alarms([0.0, -0.7, -0.7, -0.7], every_s=1.0) == [3]


def test_a_change_tells_how_many_steps_show_it_since_when_and_what_held_before() -> None:
    detector = ChangeDetector()
    seen = [detector.observe(e, float(i), 10.0 + i) for i, e in enumerate([0.0, 0.7, 0.7, 0.7])]

    assert seen == [None, None, None, (3, 1.0, 11.0)]


@pytest.mark.parametrize(
    "errors",
    [
        [5.0, 0.0, 0.0, 0.0, 0.0],  # one step that was held up, however long
        [0.7, -0.7] * 20,  # to either side
        [0.2] * 200,  # what a wrong shape explains
    ],
)
def test_what_is_no_change(errors: list[float]) -> None:
    assert not alarms(errors, every_s=1.0)


def test_a_slow_stretch_of_a_second_is_no_change() -> None:
    slow, fast = [0.4] * 20, [0.0] * 60

    assert not alarms(list(itertools.chain(slow, fast, slow)), every_s=0.05)
