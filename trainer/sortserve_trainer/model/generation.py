"""Texts that a model writes: what it is given for each prompt, and what is worth keeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sortserve import LLM, SamplingParams
from sortserve.core.request import FinishReason
from sortserve.llm import Completion
from sortserve_trainer.model.repetition import repeated_ngrams

__all__ = ["is_sound", "sampling_for"]


def is_sound(written: Completion, *, max_repetition: float) -> bool:
    """Whether a text came to an end of its own, and does not go around in circles.

    Args:
        written: by the model.
        max_repetition: share of its 4-grams of words that occurred before; as many are too many.
    """
    is_whole = written.finish_reason is FinishReason.STOP
    return is_whole and repeated_ngrams(written.text.split()) < max_repetition


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
