"""Steps that no request asked for: what a calibration times, on the free pages of a pool."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

import numpy as np

from sortserve.core.plan import RowPlan, Runner, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.cost.model import REGIME_TOKENS, step_shape

__all__ = ["DECODE_ROWS", "PREFILL_TOKENS", "SURVEY_ROWS", "SURVEY_TOKENS", "SyntheticPlans"]

DECODE_ROWS = (1, 4, 16, 32)
PREFILL_TOKENS = (64, 128, 256, 512)
MANY_ROWS = 128
"""Rows of a large step in which all decode."""
SHORT_PROMPTS = 16
CONTEXTS = (16, 256)
SURVEY_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
SURVEY_CONTEXTS = (16, 256, 768)
SURVEY_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
MAX_CONTEXT = 4096


class SyntheticPlans:
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
        return -(-context // self._runner.block_size) * self._runner.slabs.count(exit_layer)

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
        num_slabs = self._runner.slabs.count(exit_layer)
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


def _three_of(exits: Sequence[int]) -> list[int]:
    """The shallowest, a middle and the deepest exit, deepest first."""
    return sorted({exits[0], exits[len(exits) // 2], exits[-1]}, reverse=True)
