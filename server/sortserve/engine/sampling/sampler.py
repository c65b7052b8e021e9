"""From logits to the next token of every row: batched, and no row sees its neighbours.

The order is fixed: repetition penalty, presence and frequency penalties, logit_bias, the mask below
min_tokens or of a grammar, temperature, top_k, top_p, min_p. The meaning of each step is that of
transformers' logits processor of the same name (presence and frequency: OpenAI's formula), and the
tests hold every row to those classes.

A sampled token is the inverse of the cumulative distribution, in vocabulary order, at one number
``uniform(seed, position)``. That number depends on nothing else, so a seeded request gives the same
tokens alone, in any batch, chunked, or preempted and resumed, and ten lines offline reproduce it.
Sums along a row do not depend on the number of rows. ``sampling.batched`` defines the token, and is
what a GPU does. On a CPU, where ordering a vocabulary costs as much as a hundred passes over it and
a look at a number costs nothing, ``sampling.filters`` searches for the few candidates and comes to
the same; a backend (``RowSampling``) may be faster still, and answers only where it cannot be
another token.

Shapes: R rows of the batch, N the rows that one function works on, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingRow
from sortserve.engine.sampling.batched import BatchedSampler
from sortserve.engine.sampling.bitmask import (
    Masks,
    apply_bitmasks,
    failures_of,
    make_masks,
    words_of,
)
from sortserve.engine.sampling.edits import (
    HUGE_LOGIT,
    Editor,
    is_below_min_tokens,
    is_edited,
    is_plain,
    is_touched,
)
from sortserve.engine.sampling.filters import draw_filtered, has_filter
from sortserve.engine.sampling.logprobs import Report, log_sums
from sortserve.engine.sampling.row import (
    NOT_FINITE,
    no_token_for,
    noise_of,
    temperature_of,
    uniform,
)
from sortserve.engine.sampling.samples import KnownSamples, Samples
from sortserve.engine.sampling.vocab_ops import (
    argmax,
    block_maxima,
    draw,
    num_blocks,
    take_rows,
)
from sortserve.model.backend import RowSampling

__all__ = ["Sampler", "uniform"]


class Sampler:
    """Chooses one token per row.

    Everything a row needs is in its SamplingRow. A row that comes again as the same object is
    served faster, because its tokens need not be counted again; no token depends on that.

    Args:
        fast: a backend's way to the same tokens on a CPU, asked first; None: there is none.
        batched: whether to sample on a CPU as on a GPU.
    """

    def __init__(self, fast: RowSampling | None = None, *, batched: bool = False) -> None:
        self._fast = fast
        self._editor = Editor()
        self._batched = BatchedSampler(self._editor)
        self._always_batched = batched

    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None
    ) -> list[SampledToken | RowFailure]:
        """One token per row, in order; a failure in place of a row that has none.

        Greedy rows take the first of the largest logits after penalties and bias. ``logprobs`` come
        from the logits as they came in. A row fails if its largest logit is not a finite number, or
        if ``min_tokens`` masks all of them; the others get what they would get without it.

        Args:
            logits_RV: float32, on any device. Consumed: what is in it afterwards is left open.
            rows: what each row asks for. Ids in ``logit_bias`` must be below V.
            masks: of the constrained rows, where they are made already.
        """
        return self.start(logits_RV, rows, masks).results()

    @torch.inference_mode()
    def start(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None
    ) -> Samples:
        """The same, but the host waits for a device no sooner than it asks for the results."""
        assert logits_RV.dtype == torch.float32, "logits are float32"
        assert logits_RV.shape[0] == len(rows), "one row of logits per row"
        logits_RV = logits_RV.contiguous()
        if not rows:
            return KnownSamples([])
        masks = make_masks(rows, logits_RV.shape[1]) if masks is None else masks
        if self._always_batched or logits_RV.device.type != "cpu":
            return self._batched.start(logits_RV, rows, masks)
        return KnownSamples(self._search(logits_RV, rows, masks))

    def _search(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], masks: Masks
    ) -> list[SampledToken | RowFailure]:
        """The way of a CPU, where looking is cheap and passes over the vocabulary are dear."""
        failed = failures_of(rows, masks)
        maxima_RK = self._block_maxima(logits_RV)
        token_ids, largest = argmax(logits_RV, maxima_RK)
        healthy = [r for r, value in enumerate(largest) if math.isfinite(value) and r not in failed]
        for r in healthy:
            if abs(largest[r]) > HUGE_LOGIT:
                logits_RV[r] -= largest[r]  # the same distribution
                maxima_RK[r] -= largest[r]
        chosen = self._choose(
            take_rows(logits_RV, healthy),
            take_rows(maxima_RK, healthy),
            [rows[r] for r in healthy],
            [token_ids[r] for r in healthy],
            masks,
        )
        by_row = failed | dict(zip(healthy, chosen, strict=True))
        return [by_row.get(r, NOT_FINITE) for r in range(len(rows))]

    def _choose(
        self,
        logits_RV: Tensor,
        maxima_RK: Tensor,
        rows: Sequence[SamplingRow],
        token_ids: Sequence[int],
        masks: Masks,
    ) -> list[SampledToken | RowFailure]:
        """A token or a failure for each row.

        Args:
            logits_RV: of each row, the largest one finite.
            maxima_RK: their ``block_maxima``.
            rows: what each row asks for.
            token_ids: each row's argmax.
            masks: of the constrained rows.
        """
        if all(is_plain(row) for row in rows):
            return [SampledToken(token_id) for token_id in token_ids]

        reported = [r for r, row in enumerate(rows) if row.params.logprobs is not None]
        num_top = [rows[r].params.logprobs or 0 for r in reported]
        report = self._report(logits_RV, maxima_RK, reported, num_top)  # before the edits
        edited = {r: row for r, row in enumerate(rows) if is_edited(row)}
        new_ids, masked, take_back = self._edit(logits_RV, maxima_RK, edited, masks)
        to_draw = {r: w for r, w in enumerate(rows) if not w.params.greedy and r not in masked}
        new_ids |= self._draw(logits_RV, maxima_RK, to_draw)

        sampled = [SampledToken(new_ids.get(r, token_id)) for r, token_id in enumerate(token_ids)]
        if report is not None:
            take_back()
            chosen = report.describe(logits_RV, [sampled[r].token_id for r in reported])
            for r, token in zip(reported, chosen, strict=True):
                sampled[r] = token
        return [no_token_for(rows[r]) if r in masked else t for r, t in enumerate(sampled)]

    def _edit(
        self,
        logits_RV: Tensor,
        maxima_RK: Tensor,
        edited: Mapping[int, SamplingRow],
        masks: Masks,
    ) -> tuple[dict[int, int], set[int], Callable[[], object]]:
        """Edit these rows and their maxima in place.

        Returns:
            The new argmax of greedy rows, which rows have no token left, and what takes the edits
            of the logits back.
        """
        touched = {r: row for r, row in edited.items() if is_touched(row)}
        take_back = self._editor.edit(logits_RV, touched)
        if touched:
            maxima_RK[list(touched)] = self._block_maxima(take_rows(logits_RV, list(touched)))
        if words := words_of(edited, masks):
            self._apply_bitmasks(logits_RV, maxima_RK, words)
        greedy = [r for r, row in edited.items() if row.params.greedy]
        new_ids, _ = argmax(take_rows(logits_RV, greedy), take_rows(maxima_RK, greedy))
        looked_at = [r for r, row in edited.items() if _is_masked(row)]
        largest = take_rows(maxima_RK, looked_at).amax(-1).tolist()
        masked = {r for r, value in zip(looked_at, largest, strict=True) if value == -math.inf}
        return dict(zip(greedy, new_ids, strict=True)), masked, take_back

    def _block_maxima(self, logits_RV: Tensor) -> Tensor:
        if self._fast is None:
            return block_maxima(logits_RV)
        return self._fast.block_maxima(logits_RV, num_blocks(logits_RV.shape[1]))

    def _apply_bitmasks(
        self, logits_RV: Tensor, maxima_RK: Tensor, masks: Mapping[int, NDArray[np.int32]]
    ) -> None:
        if self._fast is not None:
            self._fast.apply_bitmasks(logits_RV, maxima_RK, masks)
            return
        apply_bitmasks(logits_RV, masks)
        maxima_RK[list(masks)] = block_maxima(take_rows(logits_RV, list(masks)))

    def _report(
        self,
        logits_RV: Tensor,
        maxima_RK: Tensor,
        reported: Sequence[int],
        num_top: Sequence[int],
    ) -> Report | None:
        """None where no row reports."""
        if not reported:
            return None
        if self._fast is None:
            log_sum_N = log_sums(take_rows(logits_RV, reported))
        else:
            log_sum_N = self._fast.log_sums(logits_RV, maxima_RK, reported)
        return Report(logits_RV, maxima_RK, reported, num_top, log_sum_N)

    def _draw(
        self, logits_RV: Tensor, maxima_RK: Tensor, rows: Mapping[int, SamplingRow]
    ) -> dict[int, int]:
        """The sampled token of every row in ``rows``."""
        if self._fast is None or not rows:
            return _draw(logits_RV, maxima_RK, rows)
        is_low = _is_low(maxima_RK).tolist()
        asked = {r: row for r, row in rows.items() if not is_low[r]}
        tokens = self._fast.draw_tokens(
            logits_RV,
            maxima_RK,
            list(asked),
            [temperature_of(row) for row in asked.values()],
            [row.params for row in asked.values()],
            [noise_of(row) for row in asked.values()],
        )
        drawn = {r: token for r, token in zip(asked, tokens, strict=True) if token is not None}
        left = {r: row for r, row in rows.items() if r not in drawn}
        return drawn | _draw(logits_RV, maxima_RK, left)


def _is_masked(row: SamplingRow) -> bool:
    return row.constraint is not None or is_below_min_tokens(row)


# ---- drawing ----------------------------------------------------------------------------------


def _draw(logits_RV: Tensor, maxima_RK: Tensor, rows: Mapping[int, SamplingRow]) -> dict[int, int]:
    """The same, the plain way. Rows with a filter go their own."""
    drawn: dict[int, int] = {}
    filtered = {r: row for r, row in rows.items() if has_filter(row.params)}
    if filtered:
        params = [row.params for row in filtered.values()]
        scores_NV, maxima_NK = _scores(logits_RV, maxima_RK, filtered)
        tokens = draw_filtered(scores_NV, _noises(logits_RV, filtered), params, maxima_NK)
        drawn.update(zip(filtered, tokens, strict=True))
    unfiltered = {r: row for r, row in rows.items() if r not in filtered}
    if unfiltered:
        scores_NV, _ = _scores(logits_RV, maxima_RK, unfiltered)
        token_N = draw(scores_NV.softmax(-1), _noises(logits_RV, unfiltered))
        drawn.update(zip(unfiltered, token_N.tolist(), strict=True))
    return drawn


def _scores(
    logits_RV: Tensor, maxima_RK: Tensor, rows: Mapping[int, SamplingRow]
) -> tuple[Tensor, Tensor]:
    """Logits over temperature [N, V], and their block maxima: division keeps the order."""
    temperatures = [temperature_of(row) for row in rows.values()]
    scores_NV, maxima_NK = take_rows(logits_RV, list(rows)), take_rows(maxima_RK, list(rows))
    if all(temperature == 1.0 for temperature in temperatures):
        return scores_NV, maxima_NK
    temperature_N1 = torch.tensor(temperatures, dtype=torch.float32)[:, None]
    is_low_N = _is_low(maxima_NK)
    if bool(is_low_N.any()):
        shift_N1 = torch.where(is_low_N, maxima_NK.amax(-1), 0.0)[:, None]
        scores_NV, maxima_NK = scores_NV - shift_N1, maxima_NK - shift_N1
    return scores_NV / temperature_N1, maxima_NK / temperature_N1


def _is_low(maxima_NK: Tensor) -> Tensor:
    """Whether the edits took so much from a row that a low temperature may leave nothing finite."""
    return maxima_NK.amax(-1) < -HUGE_LOGIT


def _noises(like: Tensor, rows: Mapping[int, SamplingRow]) -> Tensor:
    """Each row's noise, float64 [N]."""
    noise = [noise_of(row) for row in rows.values()]
    return torch.tensor(noise, dtype=torch.float64, device=like.device)
