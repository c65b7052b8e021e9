"""From logits to the next token of every row: batched, and no row sees its neighbours.

The order is fixed: repetition penalty, presence and frequency penalties, logit_bias, the mask below
min_tokens, temperature, top_k, top_p, min_p. The meaning of each step is that of transformers'
logits processor of the same name (presence and frequency: OpenAI's formula), and the tests hold
every row to those classes.

A sampled token is the inverse of the cumulative distribution, in vocabulary order, at one number
``uniform(seed, position)``. That number depends on nothing else, so a seeded request gives the same
tokens alone, in any batch, chunked, or preempted and resumed, and ten lines offline reproduce it.
Sums along a row do not depend on the number of rows.

Shapes: R rows of the batch, N the rows that one function works on, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingRow, TokenLogprob
from sortserve.engine.sampling.filters import draw_filtered, has_filter
from sortserve.engine.sampling.vocab_ops import argmax, at_least, draw, pick, take_rows

__all__ = ["Sampler", "uniform"]

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of SplitMix64

# Edited logits stay finite in float32: 1e6 over the lowest penalty is the huge logit, and that over
# the lowest temperature is 1e38.
_LOWEST_TEMPERATURE = 1e-20
"""Greedy in all but name."""
_LOWEST_PENALTY = 1e-12
"""0 in all but name."""
_HUGE_LOGIT = 1e18
"""No edited logit is larger."""

_NOT_FINITE = RowFailure("non_finite", "its logits are not finite numbers")
_ALL_MASKED = RowFailure("non_finite", "min_tokens masks every token of the vocabulary")


def uniform(seed: int, position: int) -> float:
    """The noise of the token at ``position``: a float64 in [0, 1), the same everywhere.

    ``mix(mix(seed) + (position + 1) * golden)``, its top 53 bits over 2**53, all modulo 2**64.
    ``mix`` is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        seed: any integer; its lowest 64 bits count.
        position: how many tokens the request has generated before this one.
    """
    state = _mix(_mix(seed & _MASK_64) + (position + 1) * _GOLDEN & _MASK_64)
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK_64
    return value ^ value >> 31


class Sampler:
    """Chooses one token per row. Keeps no state: everything a row needs is in its SamplingRow."""

    @torch.inference_mode()
    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow]
    ) -> list[SampledToken | RowFailure]:
        """One token per row, in order; a failure in place of a row that has none.

        Greedy rows take the first of the largest logits after penalties and bias. ``logprobs`` come
        from the logits as they came in. A row fails if its largest logit is not a finite number, or
        if ``min_tokens`` masks all of them; the others get what they would get without it.

        Args:
            logits_RV: float32, on any device. Consumed: what is in it afterwards is left open.
            rows: what each row asks for. Ids in ``logit_bias`` must be below V.
        """
        assert logits_RV.dtype == torch.float32, "logits are float32"
        assert logits_RV.shape[0] == len(rows), "one row of logits per row"
        token_ids, largest = argmax(logits_RV)
        healthy = [r for r, value in enumerate(largest) if math.isfinite(value)]
        for r in healthy:
            if abs(largest[r]) > _HUGE_LOGIT:
                logits_RV[r] -= largest[r]  # the same distribution
        chosen = dict(
            zip(
                healthy,
                _choose(
                    take_rows(logits_RV, healthy),
                    [rows[r] for r in healthy],
                    [token_ids[r] for r in healthy],
                ),
                strict=True,
            )
        )
        return [chosen.get(r, _NOT_FINITE) for r in range(len(rows))]


def _choose(
    logits_RV: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]
) -> list[SampledToken | RowFailure]:
    """A token or a failure for each row.

    Args:
        logits_RV: of each row, the largest one finite.
        rows: what each row asks for.
        token_ids: each row's argmax.
    """
    if all(_is_plain(row) for row in rows):
        return [SampledToken(token_id) for token_id in token_ids]

    reported = [r for r, row in enumerate(rows) if row.params.logprobs is not None]
    raw_NV = logits_RV[reported]  # a copy, taken before the edits
    new_ids, masked = _edited_argmax(logits_RV, rows, _edit(logits_RV, rows))
    to_draw = {r: w for r, w in enumerate(rows) if not w.params.greedy and r not in masked}
    new_ids |= _draw(logits_RV, to_draw)

    sampled = [SampledToken(new_ids.get(r, token_id)) for r, token_id in enumerate(token_ids)]
    if reported:
        chosen = [sampled[r].token_id for r in reported]
        num_top = [rows[r].params.logprobs or 0 for r in reported]
        for r, token in zip(reported, _with_logprobs(raw_NV, chosen, num_top), strict=True):
            sampled[r] = token
    return [_ALL_MASKED if r in masked else token for r, token in enumerate(sampled)]


def _edited_argmax(
    logits_RV: Tensor, rows: Sequence[SamplingRow], edited: Sequence[int]
) -> tuple[dict[int, int], set[int]]:
    """The new argmax of edited greedy rows, and which rows have no token left."""
    looked_at = [r for r in edited if rows[r].params.greedy or _is_below_min_tokens(rows[r])]
    token_ids, largest = argmax(take_rows(logits_RV, looked_at))
    masked = {r for r, value in zip(looked_at, largest, strict=True) if value == -math.inf}
    return dict(zip(looked_at, token_ids, strict=True)), masked


def _is_plain(row: SamplingRow) -> bool:
    return row.params.greedy and row.params.logprobs is None and not _is_edited(row)


def _is_edited(row: SamplingRow) -> bool:
    params = row.params
    return params.has_penalties or bool(params.logit_bias) or _is_below_min_tokens(row)


def _is_below_min_tokens(row: SamplingRow) -> bool:
    return len(row.output_token_ids) < row.params.min_tokens


# ---- penalties, bias, mask --------------------------------------------------------------------


def _edit(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Apply penalties, bias and the min_tokens mask in place; the indices of the edited rows."""
    edited = [r for r, row in enumerate(rows) if _is_edited(row)]
    _penalise_repetition(logits_RV, {r: rows[r] for r in edited})
    _add(logits_RV, {r: _additions(rows[r], logits_RV.shape[1]) for r in edited})
    _mask_stop_tokens(logits_RV, {r: rows[r] for r in edited if _is_below_min_tokens(rows[r])})
    return edited


def _penalise_repetition(logits_RV: Tensor, rows: Mapping[int, SamplingRow]) -> None:
    """Divide positive and multiply negative logits of every token seen in prompt or output."""
    chosen = {r: row for r, row in rows.items() if row.params.repetition_penalty != 1.0}
    seen = {r: {*row.prompt_token_ids, *row.output_token_ids} for r, row in chosen.items()}
    penalties = [
        max(chosen[r].params.repetition_penalty, _LOWEST_PENALTY)
        for r, ids in seen.items()
        for _ in ids
    ]
    if penalties:
        at = _flat_index(seen, logits_RV.device)
        penalty = torch.tensor(penalties, dtype=torch.float32, device=logits_RV.device)
        old = logits_RV[at]
        new = torch.where(old < 0, old * penalty, old / penalty)
        logits_RV[at] = new.clamp(max=_HUGE_LOGIT)


def _additions(row: SamplingRow, vocab_size: int) -> dict[int, float]:
    """What presence and frequency penalties and logit_bias add to the logit of each token."""
    params = row.params
    added: dict[int, float] = {}
    if params.presence_penalty or params.frequency_penalty:
        for token_id, count in Counter(row.output_token_ids).items():
            added[token_id] = -params.presence_penalty - params.frequency_penalty * count
    for token_id, bias in params.logit_bias.items():
        assert token_id < vocab_size, f"logit_bias for token {token_id} of {vocab_size}"
        added[token_id] = added.get(token_id, 0.0) + bias
    return added


def _add(logits_RV: Tensor, additions: Mapping[int, Mapping[int, float]]) -> None:
    values = [value for added in additions.values() for value in added.values()]
    if values:
        at = _flat_index(additions, logits_RV.device)
        logits_RV[at] += torch.tensor(values, dtype=torch.float32, device=logits_RV.device)


def _mask_stop_tokens(logits_RV: Tensor, rows: Mapping[int, SamplingRow]) -> None:
    vocab_size = logits_RV.shape[1]
    masked = {r: [i for i in row.stop_token_ids if i < vocab_size] for r, row in rows.items()}
    if any(masked.values()):
        logits_RV[_flat_index(masked, logits_RV.device)] = -math.inf


def _flat_index(
    ids_by_row: Mapping[int, Collection[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and token indices of all the pairs; each pair must be there only once."""
    row_ids = [r for r, ids in ids_by_row.items() for _ in ids]
    token_ids = [token_id for ids in ids_by_row.values() for token_id in ids]
    return torch.tensor(row_ids, device=device), torch.tensor(token_ids, device=device)


# ---- drawing ----------------------------------------------------------------------------------


def _draw(logits_RV: Tensor, rows: Mapping[int, SamplingRow]) -> dict[int, int]:
    """The sampled token of every row in ``rows``. Rows with a filter go their own way."""
    drawn: dict[int, int] = {}
    filtered = {r: row for r, row in rows.items() if has_filter(row.params)}
    if filtered:
        params = [row.params for row in filtered.values()]
        tokens = draw_filtered(*_scores_and_noise(logits_RV, filtered), params)
        drawn.update(zip(filtered, tokens, strict=True))
    unfiltered = {r: row for r, row in rows.items() if r not in filtered}
    if unfiltered:
        scores_NV, noise_N = _scores_and_noise(logits_RV, unfiltered)
        token_N = draw(scores_NV.softmax(-1), noise_N)
        drawn.update(zip(unfiltered, token_N.tolist(), strict=True))
    return drawn


def _scores_and_noise(logits_RV: Tensor, rows: Mapping[int, SamplingRow]) -> tuple[Tensor, Tensor]:
    """Logits over temperature [N, V] and each row's noise [N]."""
    temperatures = [max(row.params.temperature, _LOWEST_TEMPERATURE) for row in rows.values()]
    noise = [uniform(row.seed, len(row.output_token_ids)) for row in rows.values()]
    temperature_N = torch.tensor(temperatures, dtype=torch.float32, device=logits_RV.device)
    noise_N = torch.tensor(noise, dtype=torch.float64, device=logits_RV.device)
    return take_rows(logits_RV, list(rows)).div_(temperature_N[:, None]), noise_N


# ---- logprobs ---------------------------------------------------------------------------------


def _with_logprobs(
    logits_NV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[SampledToken]:
    """The tokens with their log-probability and that of the ``num_top`` most likely ones.

    Of equally likely tokens the lower id comes first, so that a greedy token heads its list.
    """
    logprobs_NV = logits_NV.log_softmax(-1)
    chosen_N = pick(logprobs_NV, torch.tensor(token_ids, device=logits_NV.device))
    widest = min(max(*num_top, 1), logits_NV.shape[1])
    ids_NC, count_N = at_least(logprobs_NV, logprobs_NV.topk(widest).values[:, -1:])
    values_NC = logprobs_NV.gather(1, ids_NC)
    sampled = []
    for token_id, chosen, k, ids, values, count in zip(
        token_ids,
        chosen_N.tolist(),
        num_top,
        ids_NC.tolist(),
        values_NC.tolist(),
        count_N.tolist(),
        strict=True,
    ):
        likeliest = sorted(zip(values[:count], ids[:count], strict=True), key=_likeliest_first)
        top = tuple(TokenLogprob(i, value) for value, i in likeliest[:k])
        sampled.append(SampledToken(token_id, chosen, top))
    return sampled


def _likeliest_first(value_and_id: tuple[float, int]) -> tuple[float, int]:
    value, token_id = value_and_id
    return -value, token_id
