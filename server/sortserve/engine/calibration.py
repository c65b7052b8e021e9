"""Measure steps at start-up and fit the cost model to them."""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sortserve.engine.engine import Runner
from sortserve.engine.steps import step_shape
from sortserve.sampling_params import SamplingParams, SamplingRow
from sortserve.scheduling.cost_model import CostModel, StepShape
from sortserve.scheduling.plan import RowPlan, StepPlan

__all__ = ["calibrate", "spot_check"]

logger = logging.getLogger(__name__)

DECODE_ROWS = (1, 4, 16, 32)
PREFILL_TOKENS = (64, 128, 256, 512)
CONTEXTS = (16, 256)
REPEATS = 3


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

    Runs the shallowest, a middle and the deepest exit over batches of 1 to 32 decode rows and
    prompts of 64 to 512 tokens, at two context lengths, as far as ``budget_s`` seconds go. The
    pages written are free ones: call it before the first request, and on the engine's thread, whose
    thread pool and memory it warms up.
    """
    chosen = _three_of(exits)
    plans = _Plans(runner, vocab_size, min(max_model_len, 4096))
    start = clock()
    runner.execute(plans.prefill(chosen[0], min(64, max_num_batched_tokens)))  # warm-up
    samples: list[tuple[StepShape, float]] = []
    for plan in plans.all(chosen, max_num_batched_tokens, max_num_seqs):
        if clock() - start > budget_s and len(samples) >= 8:
            logger.info("calibration stopped after %d shapes: %.1f s", len(samples), budget_s)
            break
        samples.append((step_shape(plan), _time_of(runner, plan, clock)))
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

    Takes less than a second, and warms up what the first request needs warm.
    """
    plans = _Plans(runner, vocab_size, min(max_model_len, 4096))
    chosen = [plan for e in (exits[-1], exits[0]) for plan in plans.few(e, max_num_seqs)]
    chosen += [plans.prefill(exits[-1], min(128, max_num_batched_tokens, max_model_len // 2))]
    runner.execute(chosen[-1])
    ratios = [
        _time_of(runner, plan, clock) / max(model.step_s(step_shape(plan)), 1e-9) for plan in chosen
    ]
    return statistics.median(ratios)


def _three_of(exits: Sequence[int]) -> list[int]:
    """The shallowest, a middle and the deepest exit, deepest first."""
    return sorted({exits[0], exits[len(exits) // 2], exits[-1]}, reverse=True)


def _time_of(runner: Runner, plan: StepPlan, clock: Callable[[], float]) -> float:
    """The median seconds of a step."""
    seconds = []
    for _ in range(REPEATS):
        before = clock()
        runner.execute(plan)
        seconds.append(clock() - before)
    return max(statistics.median(seconds), 1e-6)


class _Plans:
    """Synthetic steps over pages 0, 1, 2, ... of an empty pool."""

    def __init__(self, runner: Runner, vocab_size: int, max_context: int) -> None:
        self._runner = runner
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._random = random.Random(0)

    def all(self, exits: Sequence[int], max_tokens: int, max_seqs: int) -> Iterator[StepPlan]:
        """The shapes to measure, cheap and telling ones first."""
        for num_rows in DECODE_ROWS:
            for context in CONTEXTS:
                for exit_layer in exits:
                    if num_rows <= max_seqs and self._fits(exit_layer, num_rows, context):
                        yield self._decode(exit_layer, num_rows, context)
        for num_tokens in PREFILL_TOKENS:
            for exit_layer in exits:
                if num_tokens <= max_tokens and self._fits(exit_layer, 1, num_tokens):
                    yield self.prefill(exit_layer, num_tokens)

    def few(self, exit_layer: int, max_seqs: int) -> Iterator[StepPlan]:
        """A small and a larger decode step."""
        for num_rows in (1, 16):
            if num_rows <= max_seqs and self._fits(exit_layer, num_rows, CONTEXTS[0]):
                yield self._decode(exit_layer, num_rows, CONTEXTS[0])

    def _fits(self, exit_layer: int, num_rows: int, context: int) -> bool:
        pages = num_rows * self._num_pages(exit_layer, context)
        return context < self._max_context and pages <= self._runner.num_pages

    def _num_pages(self, exit_layer: int, context: int) -> int:
        return -(-context // self._runner.block_size) * (exit_layer // self._runner.slab_size)

    def prefill(self, exit_layer: int, num_tokens: int) -> StepPlan:
        """One prompt."""
        row = self._row(exit_layer, start=0, num_tokens=num_tokens, first_page=0)
        return StepPlan(rows=(row,), depth_cap=exit_layer)

    def _decode(self, exit_layer: int, num_rows: int, context: int) -> StepPlan:
        stride = self._num_pages(exit_layer, context)
        rows = tuple(
            self._row(exit_layer, start=context - 1, num_tokens=1, first_page=r * stride)
            for r in range(num_rows)
        )
        return StepPlan(rows=rows, depth_cap=exit_layer)

    def _row(self, exit_layer: int, *, start: int, num_tokens: int, first_page: int) -> RowPlan:
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
