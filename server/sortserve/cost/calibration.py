"""Measure steps at start-up and fit the cost model to them."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from sortserve.core.plan import Runner, StepPlan
from sortserve.cost.model import REGIME_TOKENS, CostModel, Samples, StepShape, step_shape
from sortserve.cost.stalls import without_stalls
from sortserve.cost.synthetic import SyntheticPlans

__all__ = ["calibrate", "fault_of", "slowed", "spot_check", "survey"]

logger = logging.getLogger(__name__)

SURVEY_ROUNDS = 5
REPEATS = 3
AS_EXPECTED = 1.2
"""Steps that take as long as a model says, up to this factor, need not be timed again."""

MAX_MEDIAN_ERROR = 0.3
"""A calibration that misses its own samples by more, in the median of small or of large steps, says
nothing about this machine."""
SLOWED_QUANTILE = 0.9
"""The share of such a calibration's samples that the model made of it covers."""


def calibrate(
    runner: Runner,
    *,
    exits: Sequence[int],
    vocab_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    clock: Callable[[], float],
    budget_s: float = 8.0,
) -> list[tuple[StepShape, float]]:
    """Time synthetic steps on the empty KV pool; the samples to fit a cost model to.

    Runs the shallowest, a middle and the deepest exit over prompts of 64 to 512 tokens and batches
    of 1 to 128 decode rows, at two context lengths, as far as ``budget_s`` seconds go. Shapes that
    tell the costs of large steps and then of small ones apart come first, and are timed at least
    once however slow the machine: neither line is ever guessed from the other. They are timed in
    rounds, so that a moment at which the machine is held up spoils one time of several shapes and
    not all times of one; what is more than the others allow is cut off (``without_stalls``). The
    pages written are free ones: call it before the first request, and on the engine's thread, whose
    thread pool and memory it warms up.
    """
    plans = SyntheticPlans(
        runner, exits, vocab_size, max_model_len, max_num_batched_tokens, max_num_seqs
    )
    start = clock()
    telling = plans.telling()
    runner.execute(telling[0])  # warm-up
    samples = _time_in_rounds(runner, telling, clock, start + budget_s)
    for plan in plans.further():
        if clock() - start > budget_s:
            logger.info("calibration stopped after %d shapes: %.1f s", len(samples), budget_s)
            break
        samples += _time_in_rounds(runner, [plan], clock, start + budget_s)
    samples = without_stalls(samples)
    model = CostModel.fit(samples)
    errors = sorted(abs(model.step_s(shape) / seconds - 1) for shape, seconds in samples)
    logger.info(
        "cost model: %d shapes in %.1f s, median error %.1f %%, 95th percentile %.1f %%",
        len(samples),
        clock() - start,
        100 * statistics.median(errors),
        100 * errors[int(0.95 * (len(errors) - 1))],
    )
    return samples


def survey(
    runner: Runner,
    *,
    exits: Sequence[int],
    vocab_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    clock: Callable[[], float],
    budget_s: float = 30.0,
) -> list[tuple[StepShape, float]]:
    """Time many more steps than a calibration does, for a simulation of this machine.

    Rounds over all of them, one at least, as far as ``budget_s`` goes: a machine that gets slower
    meanwhile does so for all alike. Every run of a step is a sample of its own.
    """
    plans = SyntheticPlans(
        runner, exits, vocab_size, max_model_len, max_num_batched_tokens, max_num_seqs
    )
    chosen = plans.many()
    runner.execute(chosen[0])  # warm-up
    start, samples = clock(), list[tuple[StepShape, float]]()
    for _ in range(SURVEY_ROUNDS):
        samples += [(step_shape(plan), _time_once(runner, plan, clock)) for plan in chosen]
        if clock() - start > budget_s:
            break
    return samples


def fault_of(
    samples: Samples,
    runner: Runner,
    *,
    exits: Sequence[int],
    vocab_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
) -> str | None:
    """Why a calibration cannot be believed; None if it can.

    It can if it has steps of each regime that is possible here, and if a model that is fitted to it
    predicts them (``MAX_MEDIAN_ERROR``).
    """
    plans = SyntheticPlans(
        runner, exits, vocab_size, max_model_len, max_num_batched_tokens, max_num_seqs
    )
    possible = {_regime(step_shape(plan)) for plan in plans.telling()}
    errors: dict[str, list[float]] = {regime: [] for regime in sorted(possible)}
    model = CostModel.fit(samples)
    for shape, seconds in samples:
        error = abs(model.step_s(shape) / seconds - 1)
        errors.setdefault(_regime(shape), []).append(error)
    for regime, found in errors.items():
        if not found:
            return f"no {regime} step was timed"
        if (median := statistics.median(found)) > MAX_MEDIAN_ERROR:
            return f"a fit misses half of the {regime} steps by {median:.0%} or more"
    return None


def slowed(samples: Samples) -> list[tuple[StepShape, float]]:
    """Samples to serve with where no calibration can be believed: better late than too early.

    The same steps with the times that a fit gives them, slowed down until it covers most of what
    was measured. Promises are few until the steps that run have taught the learner better.
    """
    model = CostModel.fit(samples)
    ratios: dict[str, list[float]] = {}
    for shape, seconds in samples:
        ratios.setdefault(_regime(shape), []).append(seconds / model.step_s(shape))
    factors = {
        regime: max(1.0, float(np.quantile(found, SLOWED_QUANTILE)))
        for regime, found in ratios.items()
    }
    return [(shape, model.step_s(shape) * factors[_regime(shape)]) for shape, _ in samples]


def _regime(shape: StepShape) -> str:
    return "large" if shape.num_tokens > REGIME_TOKENS else "small"


def spot_check(
    runner: Runner,
    model: CostModel,
    *,
    exits: Sequence[int],
    vocab_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    clock: Callable[[], float],
) -> float:
    """How much slower the machine is than a model says: the median ratio over a few steps.

    Each step is timed once, which is believed if they agree with the model (``AS_EXPECTED``); else
    all are timed as often as a calibration times them. So a machine that has changed is seen with
    as much care as ever, and the usual start spends a quarter of a second. It also warms up what
    the first request needs warm.
    """
    plans = SyntheticPlans(
        runner, exits, vocab_size, max_model_len, max_num_batched_tokens, max_num_seqs
    )
    chosen = plans.few()
    expected_s = [model.step_s(step_shape(plan)) for plan in chosen]
    runner.execute(chosen[-1])
    rounds: list[list[float]] = []
    while len(rounds) < REPEATS:
        rounds.append([_time_once(runner, plan, clock) for plan in chosen])
        seconds = map(statistics.median, zip(*rounds, strict=True))
        ratio: float = statistics.median(s / e for s, e in zip(seconds, expected_s, strict=True))
        if len(rounds) == 1 and 1 / AS_EXPECTED <= ratio <= AS_EXPECTED:
            break
    return ratio


def _time_in_rounds(
    runner: Runner, plans: Sequence[StepPlan], clock: Callable[[], float], until_s: float
) -> list[tuple[StepShape, float]]:
    """The median seconds of each step: of several rounds, as long as there is time, at least one.

    Of two times the shorter one counts: nothing makes a machine faster than it is.
    """
    times: list[list[float]] = [[] for _ in plans]
    for round_ in range(REPEATS):
        for plan, seconds in zip(plans, times, strict=True):
            if round_ == 0 or clock() < until_s:
                seconds.append(_time_once(runner, plan, clock))
    return [
        (step_shape(plan), statistics.median_low(seconds))
        for plan, seconds in zip(plans, times, strict=True)
    ]


def _time_once(runner: Runner, plan: StepPlan, clock: Callable[[], float]) -> float:
    before = clock()
    runner.execute(plan)
    return max(clock() - before, 1e-6)
