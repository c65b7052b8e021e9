"""The log-probabilities that a request asks for: the model's own, before any edit.

``logit - largest - log_sum``, for the few tokens that are told and not for the whole vocabulary.

Shapes: R rows of the batch, N those that report, V vocabulary, K blocks, C candidates of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sortserve.core.sampling_params import SampledToken, TokenLogprob
from sortserve.engine.sampling.vocab_ops import at_least, kth_largest, take_rows

__all__ = ["Report", "log_sums"]

_ROUNDING = 2.0**-21
"""Logits that differ by more than this share may not have equal log-probabilities."""


def log_sums(logits_NV: Tensor) -> Tensor:
    """``log(sum(exp(logits - largest)))`` of each row, float32 [N]."""
    return -logits_NV.log_softmax(-1).amax(-1)


class Report:
    """Looks at the logits before they are edited, and names the tokens once they are chosen.

    Args:
        logits_RV: as they came in.
        maxima_RK: their ``block_maxima``.
        rows: which of them report.
        num_top: how many of its likeliest tokens each of these tells.
        log_sum_N: their ``log_sums``.
    """

    def __init__(
        self,
        logits_RV: Tensor,
        maxima_RK: Tensor,
        rows: Sequence[int],
        num_top: Sequence[int],
        log_sum_N: Tensor,
    ) -> None:
        self._row_N = torch.tensor(rows, device=logits_RV.device)
        self._num_top = num_top
        self._log_sum_N1 = log_sum_N[:, None]
        logits_NV, maxima_NK = take_rows(logits_RV, rows), take_rows(maxima_RK, rows)
        self._largest_N1 = maxima_NK.amax(-1, keepdim=True)
        self._top = self._find_top(logits_NV, maxima_NK) if any(num_top) else None

    def describe(self, logits_RV: Tensor, token_ids: Sequence[int]) -> list[SampledToken]:
        """The tokens with their log-probability and those of the likeliest ones.

        Of equally likely tokens the lower id comes first, so that a greedy token heads its list.

        Args:
            logits_RV: as they came in, at ``token_ids`` at least.
            token_ids: what the reporting rows chose.
        """
        token_N1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
        chosen_N1 = self._logprobs(logits_RV[self._row_N[:, None], token_N1])
        chosen = chosen_N1[:, 0].tolist()
        if self._top is None:
            return [SampledToken(*pair) for pair in zip(token_ids, chosen, strict=True)]
        lists = zip(
            *(token_ids, chosen, self._num_top), *(t.tolist() for t in self._top), strict=True
        )
        return [
            SampledToken(token_id, logprob, tuple(map(TokenLogprob, ids[:k], values[:k])))
            for token_id, logprob, k, ids, values in lists
        ]

    def _find_top(self, logits_NV: Tensor, maxima_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities, likeliest first, as many as the row that wants most."""
        widest = min(max(self._num_top), logits_NV.shape[1])
        kth_N1 = kth_largest(logits_NV, [widest] * len(logits_NV), maxima_NK)
        size_N1 = (kth_N1 - self._largest_N1).abs() + self._log_sum_N1
        ids_NC, count_N = at_least(logits_NV, kth_N1 - _ROUNDING * size_N1, maxima_NK)
        padded_NC = torch.arange(ids_NC.shape[1], device=ids_NC.device) >= count_N[:, None]
        values_NC = self._logprobs(logits_NV.gather(1, ids_NC)).masked_fill(padded_NC, -math.inf)
        values_NC, order_NC = values_NC.sort(dim=-1, descending=True, stable=True)
        return ids_NC.gather(1, order_NC)[:, :widest], values_NC[:, :widest]

    def _logprobs(self, logits_NC: Tensor) -> Tensor:
        return (logits_NC - self._largest_N1) - self._log_sum_N1
