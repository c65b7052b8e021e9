"""Logits and settings of all kinds, at random, for what must sample like something else."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.grammar import Constraint, GrammarError
from sortserve.core.sampling_params import SamplingParams, SamplingRow

__all__ = ["any_constrained_row", "any_logits", "any_row"]

_SETTINGS: dict[str, list[object]] = {
    "temperature": [0.0, 0.0, 1e-300, 1e-40, 0.1, 0.8, 1.0, 1.0, 1.7, 100.0],
    "top_k": [0, 0, 1, 3, 50, 1000, 2**31 - 1],
    "top_p": [1.0, 1.0, 0.0, 1e-12, 0.3, 0.9, 0.99, 0.999999, 1.0 - 1e-12],
    "min_p": [0.0, 0.0, 5e-324, 1e-6, 0.05, 0.5, 1.0],
    "repetition_penalty": [1.0, 1.0, 1.0, 5e-324, 0.7, 1.3, 100.0],
    "presence_penalty": [0.0, 0.0, 0.0, -1.0, 2.0],
    "frequency_penalty": [0.0, 0.0, 0.0, -0.7, 0.3],
    "min_tokens": [0, 0, 0, 3, 16],
    "logprobs": [None, None, 0, 5, 20],
}


def any_row(rng: random.Random, vocab_size: int) -> SamplingRow:
    """One in three has no setting but a temperature."""
    params = {name: rng.choice(values) for name, values in _SETTINGS.items()}
    if rng.random() < 1 / 3:
        params = {"temperature": params["temperature"]}
    elif rng.random() < 1 / 3:
        params["logit_bias"] = {rng.randrange(vocab_size): rng.choice([-100.0, 2.0, 9.0])}
    tokens = [rng.randrange(vocab_size) for _ in range(rng.randrange(2, 30))]
    cut = rng.randrange(1, len(tokens))
    return SamplingRow(
        SamplingParams(max_tokens=100, **params),  # type: ignore[arg-type]
        rng.randrange(2**64),
        tuple(tokens[:cut]),
        tuple(tokens[cut:]),
        _stop_ids(rng, vocab_size),
    )


@dataclass
class _Mask:
    """A place in a grammar at which these tokens may come; None: it cannot go on."""

    allowed: frozenset[int] | None
    is_complete = False

    def fill_mask(self, mask_W: NDArray[np.int32]) -> None:
        if self.allowed is None:
            raise GrammarError("scripted failure")
        bits = np.zeros(32 * len(mask_W), dtype=np.uint8)
        bits[list(self.allowed)] = 1
        mask_W[:] = np.packbits(bits, bitorder="little").view("<i4")

    def accept(self, token_id: int) -> None:
        raise AssertionError("the sampler takes no token")

    def forced_tokens(self) -> list[int]:
        return []


def any_constrained_row(rng: random.Random, vocab_size: int) -> SamplingRow:
    """One in four may have some tokens only, few or many; one in fifty of these none."""
    row = any_row(rng, vocab_size)
    if rng.random() < 0.75:
        return row
    share = rng.choice([0.0, 0.05, 0.5, 0.99])
    some = {t for t in range(vocab_size) if rng.random() < share} | {rng.randrange(vocab_size)}
    mask = _Mask(None if rng.random() < 0.02 else frozenset(some))
    return replace(row, constraint=Constraint(mask))


def _stop_ids(rng: random.Random, vocab_size: int) -> frozenset[int]:
    """A few, of which the vocabulary may lack some; sometimes all there are."""
    if rng.random() < 0.05:
        return frozenset(range(vocab_size))
    return frozenset(rng.randrange(vocab_size + 2) for _ in range(3))


def any_logits(rng: random.Random, num_rows: int, vocab_size: int) -> Tensor:
    """Sure rows, unsure ones, flat ones; ties, tokens that cannot be; one in 50 is not finite."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator)
    for logits_V in logits_RV:
        logits_V *= rng.choice([0.0, 0.3, 1.0, 3.0, 10.0, 1e4, 1e30])
        kind = rng.randrange(4)
        if kind == 0:
            logits_V.round_()
        elif kind == 1:
            logits_V[torch.rand(vocab_size, generator=generator) < 0.5] = -torch.inf
            logits_V[rng.randrange(vocab_size)] = 1.0
        elif kind == 2:
            logits_V[rng.randrange(vocab_size)] += 5.0
        if rng.random() < 0.02:
            logits_V[rng.randrange(vocab_size)] = rng.choice([torch.nan, torch.inf])
    return logits_RV
