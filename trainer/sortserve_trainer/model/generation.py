"""What each of many prompts is answered with: its own seed, and no more than fits the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sortserve import LLM, SamplingParams

__all__ = ["sampling_for"]


def sampling_for(
    llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams
) -> list[SamplingParams]:
    """The same parameters for each prompt, with the seed moved by its index.

    Args:
        llm: whose context holds prompt and answer.
        prompts: token ids, each short enough that one more token fits.
        sampling: for all; ``max_tokens`` is cut to what the context still holds.
    """
    return [
        replace(
            sampling,
            max_tokens=max(1, min(sampling.max_tokens, llm.max_model_len - len(prompt))),
            seed=None if sampling.seed is None else sampling.seed + index,
        )
        for index, prompt in enumerate(prompts)
    ]
