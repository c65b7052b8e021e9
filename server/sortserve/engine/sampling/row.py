"""The noise of one row, and what it is told if there is no token (no torch)."""

from __future__ import annotations

from sortserve.core.sampling_params import RowFailure, SamplingRow

__all__ = ["NOT_FINITE", "no_token_for", "noise_of", "temperature_of", "uniform"]

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of SplitMix64

_LOWEST_TEMPERATURE = 1e-20
"""Greedy in all but name."""

NOT_FINITE = RowFailure("non_finite", "its logits are not finite numbers")
_ALL_MASKED = RowFailure("non_finite", "min_tokens masks every token of the vocabulary")
_ALL_IMPOSSIBLE = RowFailure("non_finite", "every token that its grammar allows scores -inf")


def no_token_for(row: SamplingRow) -> RowFailure:
    """What a row is told whose every token is masked."""
    return _ALL_MASKED if row.constraint is None else _ALL_IMPOSSIBLE


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


def noise_of(row: SamplingRow) -> float:
    """The noise of the row's next token."""
    return uniform(row.seed, len(row.output_token_ids))


def temperature_of(row: SamplingRow) -> float:
    """What the row's logits are divided by, if it is not greedy."""
    return max(row.params.temperature, _LOWEST_TEMPERATURE)
