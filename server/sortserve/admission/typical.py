"""The request that stands for all where nobody has asked yet (no torch)."""

from __future__ import annotations

from dataclasses import replace

from sortserve.core.budget import Budget, OnMiss
from sortserve.core.request import Request
from sortserve.core.sampling_params import SamplingParams

__all__ = ["typical_request"]

TYPICAL_TOKENS = 128
"""Length of its prompt and of its answer."""


def typical_request(budget: Budget, now: float) -> Request:
    """A request of middling length, which takes what it gets."""
    return Request(
        request_id="",
        prompt_token_ids=(0,) * TYPICAL_TOKENS,
        sampling=SamplingParams(max_tokens=TYPICAL_TOKENS, ignore_eos=True),
        budget=replace(budget, on_miss=OnMiss.DEGRADE),
        arrival_s=now,
    )
