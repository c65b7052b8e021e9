"""The next token of every row as tensor operations over [rows, vocabulary]: what defines it.

The host says what to do and is told the tokens at the end. In between it looks at nothing and no
size depends on a value, so a device is never waited for. No row sees its neighbours.

Shapes: R rows of the batch, N the rows that one function works on, V vocabulary, P touched logits,
M masked ones, K likeliest tokens that are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sortserve.core.sampling_params import (
    RowFailure,
    SampledToken,
    SamplingRow,
    TokenLogprob,
)
from sortserve.engine.sampling.bitmask import Masks, apply_bitmask_on_device, failures_of
from sortserve.engine.sampling.dense_filters import surviving_weights
from sortserve.engine.sampling.edits import HUGE_LOGIT, Editor, apply_edits, is_plain
from sortserve.engine.sampling.logprobs import log_sums
from sortserve.engine.sampling.orders import Draws, Orders, upload_orders
from sortserve.engine.sampling.row import NOT_FINITE, no_token_for
from sortserve.engine.sampling.vocab_ops import draw
from sortserve.engine.transfers import Download

__all__ = ["BatchedSampler", "DeviceSamples", "choose_plainly"]

_MAX_BLOCKS = 128
"""A row's largest logit is looked for in so many parts at once, at the most."""


def choose_plainly(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each row's largest logits, int64 [R], and what to tell: -1 for it if not finite.

    In two stages: of few rows a single one keeps most of a device idle.
    """
    largest_R, token_R = _largest(logits_RV)
    return token_R, torch.where(largest_R.isfinite(), token_R, -1)


def _largest(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    vocab_size = logits_RV.shape[1]
    num_blocks = next(n for n in range(_MAX_BLOCKS, 0, -1) if vocab_size % n == 0)
    largest_RK, place_RK = logits_RV.view(len(logits_RV), num_blocks, -1).max(-1)
    largest_R, block_R = largest_RK.max(-1)
    place_R = place_RK.gather(1, block_R[:, None])[:, 0]
    return largest_R, block_R * (vocab_size // num_blocks) + place_R


class BatchedSampler:
    """Chooses one token per row, on any device.

    Args:
        editor: remembers what it edits of each row.
    """

    def __init__(self, editor: Editor | None = None) -> None:
        self._editor = editor or Editor()

    @torch.inference_mode()
    def start(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None
    ) -> DeviceSamples:
        """See ``Sampler.start``; at least one row, and masks for all that are constrained."""
        masks = {} if masks is None else masks
        largest_R, token_R = _largest(logits_RV)
        if all(map(is_plain, rows)):
            is_finite_R = largest_R.isfinite()
            return DeviceSamples(rows, token_R, is_finite_R, is_finite_R)
        orders = upload_orders(rows, self._editor, logits_RV.shape[1], logits_RV.device, masks)
        is_finite_R = _make_healthy(logits_RV, largest_R)
        report = _Report(logits_RV, orders)  # before the edits
        has_some_R = is_finite_R
        if orders.has_edits:
            apply_edits(
                *(logits_RV, orders.at_P, orders.penalty_P, orders.added_P, orders.masked_M)
            )
            if len(orders.constrained_N):
                apply_bitmask_on_device(logits_RV, orders.constrained_N, orders.mask_NW)
            largest_R, token_R = _largest(logits_RV)
            has_some_R = largest_R > -torch.inf
            logits_RV.masked_fill_(~has_some_R[:, None], 0.0)
            _bring_near(logits_RV, largest_R, has_some_R)  # edits may take a row's largest
        for draws in orders.draws:
            token_R = token_R.index_copy(0, draws.row_N, _draw(logits_RV, draws))
        failed = failures_of(rows, masks)
        return DeviceSamples(rows, token_R, is_finite_R, has_some_R, report, failed)


def _make_healthy(logits_RV: Tensor, largest_R: Tensor) -> Tensor:
    """Let rows that are not finite be zeros, and bring the others near; returns who was finite."""
    is_finite_R = largest_R.isfinite()
    logits_RV.masked_fill_(~is_finite_R[:, None], 0.0)
    _bring_near(logits_RV, largest_R, is_finite_R)
    return is_finite_R


def _bring_near(logits_RV: Tensor, largest_R: Tensor, healthy_R: Tensor) -> None:
    """Let the largest logit be 0 where it is huge: the same distribution, at any temperature."""
    is_huge_R = healthy_R & (largest_R.abs() > HUGE_LOGIT)
    logits_RV -= torch.where(is_huge_R, largest_R, 0.0)[:, None]


def _draw(logits_RV: Tensor, draws: Draws) -> Tensor:
    scores_NV = logits_RV.index_select(0, draws.row_N) / draws.temperature_N[:, None]
    if draws.filters is None:
        return draw(scores_NV.softmax(-1), draws.noise_N)
    return draw(surviving_weights(scores_NV, draws.filters), draws.noise_N)


class _Report:
    """The log-probabilities that rows ask for: the model's own, before any edit."""

    def __init__(self, logits_RV: Tensor, orders: Orders) -> None:
        self.rows = orders.reporting
        self.num_top = orders.num_top
        if not self.rows:
            return
        self._row_N = orders.reporting_N
        logits_NV = logits_RV.index_select(0, self._row_N)
        log_sum_N1 = log_sums(logits_NV)[:, None]
        self._logprobs_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)) - log_sum_N1

    def describe(self, token_R: Tensor) -> list[Tensor]:
        """Of the tokens chosen [N], and, if anybody wants them, of the likeliest [N, K] and ids."""
        if not self.rows:
            return []
        chosen_N1 = self._logprobs_NV.gather(1, token_R.index_select(0, self._row_N)[:, None])
        if not any(self.num_top):
            return [chosen_N1[:, 0]]
        top_NV, ids_NV = self._logprobs_NV.sort(dim=-1, descending=True, stable=True)
        widest = max(self.num_top)
        return [chosen_N1[:, 0], top_NV[:, :widest], ids_NV[:, :widest]]


class DeviceSamples:
    """See ``Samples``. The results are on their way to the host, in one copy.

    Args:
        rows: that sample.
        token_R: int64.
        is_finite_R: whether the row's logits were.
        has_some_R: whether a token was left after the masks of ``min_tokens`` and grammars.
        report: of the rows that want log-probabilities.
        failed: why rows have no mask, by their index.
    """

    def __init__(
        self,
        rows: Sequence[SamplingRow],
        token_R: Tensor,
        is_finite_R: Tensor,
        has_some_R: Tensor,
        report: _Report | None = None,
        failed: Mapping[int, RowFailure] | None = None,
    ) -> None:
        self.token_ids_R = token_R
        self._rows, self._failed = rows, failed or {}
        self._report = report
        parts = [token_R, is_finite_R, has_some_R]
        parts += [] if report is None else report.describe(token_R)
        self._shapes = [part.shape for part in parts]
        # float64 holds every id and every float32 as it is.
        self._download = Download(torch.cat([part.double().flatten() for part in parts]))

    def results(self) -> list[SampledToken | RowFailure]:
        """See Samples."""
        values = self._download.array().tolist()
        parts = []
        for shape in self._shapes:
            parts.append(values[: shape.numel()])
            del values[: shape.numel()]
        token_ids, is_finite, has_some, *described = parts
        sampled = [SampledToken(int(token_id)) for token_id in token_ids]
        if self._report is not None and described:
            for r, token in _with_logprobs(token_ids, self._report, described):
                sampled[r] = token
        return [
            self._failed.get(r)
            or (NOT_FINITE if not finite else no_token_for(self._rows[r]) if not some else token)
            for r, (token, finite, some) in enumerate(
                zip(sampled, is_finite, has_some, strict=True)
            )
        ]


def _with_logprobs(
    token_ids: Sequence[float], report: _Report, described: Sequence[list[float]]
) -> list[tuple[int, SampledToken]]:
    """The rows that report, and their tokens."""
    chosen, *tops = described
    width = len(tops[0]) // len(chosen) if tops else 0
    tokens = []
    for n, (r, num_top) in enumerate(zip(report.rows, report.num_top, strict=True)):
        top = []
        if tops:
            values, ids = (part[n * width : n * width + num_top] for part in tops)
            # A short vocabulary has fewer than were asked for, and the next row's are not ours.
            top = list(zip(ids[:width], values[:width], strict=True))
        top_logprobs = tuple(TokenLogprob(int(id_), value) for id_, value in top)
        tokens.append((r, SampledToken(int(token_ids[r]), chosen[n], top_logprobs)))
    return tokens
