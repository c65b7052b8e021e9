"""Measure steps at start-up and fit the cost model to them."""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest

import numpy as np

from sortserve.core.plan import RowPlan, Runner, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.cost.model import REGIME_TOKENS, CostModel, Samples, StepShape, step_shape
from sortserve.cost.stalls import without_stalls

__all__ = ["calibrate", "fault_of", "slowed", "spot_check", "survey"]

logger = logging.getLogger(__name__)

DECODE_ROWS = (1, 4, 16, 32)
PREFILL_TOKENS = (64, 128, 256, 512)
MANY_ROWS = 128
"""Rows of a large step in which all decode."""
SHORT_PROMPTS = 16
CONTEXTS = (16, 256)
SURVEY_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
SURVEY_CONTEXTS = (16, 256, 768)
SURVEY_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
SURVEY_ROUNDS = 5
REPEATS = 3
MAX_CONTEXT = 4096
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
    plans = _Plans(runner, exits, vocab_size, max_model_len, max_num_batched_tokens, max_num_seqs)
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
    plans = _Plans(runner, exits, vocab_size, max_model_len, max_num_batched_tokens, max_num_seqs)
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
    plans = _Plans(runner, exits, vocab_size, max_model_len, max_num_batched_tokens, max_num_seqs)
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
    plans = _Plans(runner, exits, vocab_size, max_model_len, max_num_batched_tokens, max_num_seqs)
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


def _three_of(exits: Sequence[int]) -> list[int]:
    """The shallowest, a middle and the deepest exit, deepest first."""
    return sorted({exits[0], exits[len(exits) // 2], exits[-1]}, reverse=True)


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


class _Plans:
    """Synthetic steps over pages 0, 1, 2, ... of an empty pool, such as this engine could run."""

    def __init__(
        self,
        runner: Runner,
        exits: Sequence[int],
        vocab_size: int,
        max_model_len: int,
        max_tokens: int,
        max_seqs: int,
    ) -> None:
        self._runner = runner
        self._exits = _three_of(exits)
        self._vocab_size = vocab_size
        self._max_seqs = max_seqs
        self._max_context = max_context = min(max_model_len, MAX_CONTEXT)
        self._random = random.Random(0)
        self._tokens_limit = min(max_tokens, max_seqs * max_context)
        self._rows_limit = min(max_tokens, max_seqs)
        self._prompts = _clipped(PREFILL_TOKENS, self._tokens_limit)
        self._rows = _clipped(DECODE_ROWS, self._rows_limit)
        self._contexts = _clipped(CONTEXTS, max_context)

    def telling(self) -> list[StepPlan]:
        """The fewest that tell all costs apart: large steps first, then small ones.

        Two depths and two sizes, and the larger one twice: as a prompt and as rows that decode, as
        many as a crowd has, or as rows of two contexts.
        """
        ends = sorted({self._exits[0], self._exits[-1]}, reverse=True)
        large = [n for n in self._prompts if n > REGIME_TOKENS][:2]
        rows, contexts = self._rows, self._contexts
        chosen = [self._prompt(e, n) for n in large for e in ends]
        chosen += [self._many_rows(e, n) for n in large[-1:] for e in ends]
        for num_rows, context in ((rows[0], contexts[0]), (rows[-1], contexts[0])):
            chosen += [self._decode(e, num_rows, context) for e in ends]
        chosen += [self._decode(e, rows[-1], contexts[-1]) for e in ends]
        return _once(chosen)

    def further(self) -> list[StepPlan]:
        """All others, in turn prompts and rows that decode, so that both get on."""
        prompts = [self._prompt(e, n) for n in self._prompts for e in self._exits]
        decodes = [
            self._decode(e, num_rows, context)
            for num_rows in self._rows
            for context in self._contexts
            for e in self._exits
        ]
        told = {step_shape(plan) for plan in self.telling()}
        pairs = zip_longest(prompts, decodes)
        return [plan for plan in _once(chain(*pairs)) if step_shape(plan) not in told]

    def many(self) -> list[StepPlan]:
        """Enough to draw the curves of small and large steps at the two ends of the depth."""
        ends = sorted({self._exits[0], self._exits[-1]}, reverse=True)
        rows = _clipped(SURVEY_ROWS, self._rows_limit)
        contexts = _clipped(SURVEY_CONTEXTS, self._max_context)
        prompts = _clipped(SURVEY_TOKENS, self._tokens_limit)
        decodes = [self._decode(e, n, c) for n in rows for c in contexts for e in ends]
        return _once([*(self._prompt(e, n) for n in prompts for e in ends), *decodes])

    def few(self) -> list[StepPlan]:
        """Some of the telling ones: the least and the most rows at either depth, and a prompt."""
        telling = self.telling()
        prompts = [plan for plan in telling if plan.num_tokens > REGIME_TOKENS]
        decodes = [plan for plan in telling if plan.num_tokens <= REGIME_TOKENS]
        return decodes[:4] + prompts[:1]

    def _prompt(self, exit_layer: int, num_tokens: int, num_rows: int = 1) -> StepPlan | None:
        """So many tokens of prompts, of more than told where one cannot be so long."""
        num_rows = max(min(num_rows, self._max_seqs), -(-num_tokens // self._max_context))
        sizes = [num_tokens // num_rows + (r < num_tokens % num_rows) for r in range(num_rows)]
        return self._plan(exit_layer, [(0, size) for size in sizes])

    def _many_rows(self, exit_layer: int, num_tokens: int) -> StepPlan | None:
        """A large step in which all decode; many short prompts where so many rows do not fit."""
        plan = self._decode(exit_layer, min(MANY_ROWS, self._rows_limit), self._contexts[-1])
        if plan is not None and plan.num_tokens > REGIME_TOKENS:
            return plan
        return self._prompt(exit_layer, num_tokens, SHORT_PROMPTS)

    def _decode(self, exit_layer: int, num_rows: int, context: int) -> StepPlan | None:
        """A token each of so many rows; of as many as fit the pool."""
        most = self._runner.num_pages // self._num_pages(exit_layer, context)
        return self._plan(exit_layer, [(context - 1, 1)] * min(num_rows, most))

    def _num_pages(self, exit_layer: int, context: int) -> int:
        return -(-context // self._runner.block_size) * (exit_layer // self._runner.slab_size)

    def _plan(self, exit_layer: int, parts: Sequence[tuple[int, int]]) -> StepPlan | None:
        """Rows of (start, tokens) one after the other; None if the pool is too small for them."""
        rows, first_page = [], 0
        for start, num_tokens in parts:
            rows.append(self._row(exit_layer, start, num_tokens, first_page))
            first_page += self._num_pages(exit_layer, start + num_tokens)
        if not rows or first_page > self._runner.num_pages:
            return None
        return StepPlan(rows=tuple(rows), depth_cap=exit_layer)

    def _row(self, exit_layer: int, start: int, num_tokens: int, first_page: int) -> RowPlan:
        num_slabs = exit_layer // self._runner.slab_size
        num_blocks = -(-(start + num_tokens) // self._runner.block_size)
        pages = first_page + np.arange(num_slabs * num_blocks, dtype=np.int32)
        return RowPlan(
            request_id="calibration",
            exit_layer=exit_layer,
            start=start,
            token_ids=[self._random.randrange(self._vocab_size) for _ in range(num_tokens)],
            block_table_SB=pages.reshape(num_slabs, num_blocks),
            sampling=SamplingRow(
                params=SamplingParams(temperature=0.0),
                seed=0,
                prompt_token_ids=(),
                output_token_ids=(),
                stop_token_ids=frozenset(),
            ),
        )


def _clipped(sizes: Sequence[int], limit: int) -> list[int]:
    """The sizes up to a limit, ascending, and the limit in place of those beyond it."""
    return sorted({min(size, limit) for size in sizes})


def _once(plans: Iterable[StepPlan | None]) -> list[StepPlan]:
    """The plans that there are, each shape once, in their order."""
    return list({step_shape(plan): plan for plan in plans if plan is not None}.values())
