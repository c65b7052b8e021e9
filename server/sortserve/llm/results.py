"""What an offline engine gives back: plain frozen values (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sortserve.core.request import FinishReason, RequestReport
from sortserve.core.sampling_params import SampledToken

__all__ = ["Completion", "Result"]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample of an answer."""

    index: int
    """Which of the n samples."""
    text: str
    token_ids: tuple[int, ...]
    """With the token that ended it, if one did; its text is not in ``text``."""
    finish_reason: FinishReason
    logprobs: tuple[SampledToken, ...] | None
    """The tokens with their log probabilities; None unless the sampling parameters ask for them."""
    report: RequestReport
    """What it took: exits, times, and what became of the budget (``report.met``)."""

    @property
    def tokens_by_exit(self) -> Mapping[int, int]:
        """How many tokens were made at each exit layer."""
        return self.report.tokens_by_exit


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one prompt."""

    index: int
    """Of the prompt, in the order given."""
    prompt: str | None
    """The text that was given; None for token ids and conversations."""
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    """The n samples."""

    @property
    def text(self) -> str:
        """The text of the first sample."""
        return self.outputs[0].text
