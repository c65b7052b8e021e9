"""What the model says of a prompt's own tokens, collected while the prompt is read (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from sortserve.core.sampling_params import SampledToken

__all__ = ["PromptLogprobs"]


class PromptLogprobs:
    """The log probability of every token of a prompt but the first, given those before it.

    The runner fills it, chunk by chunk; whoever asked reads it once the request's first token is
    out. Reading a part of the prompt again (after a preemption, after a failed step, for another
    sample of the same prompt) records the same once more.

    Args:
        token_ids: the prompt.
        num_top: how many of the likeliest tokens are told beside each.
    """

    def __init__(self, token_ids: Sequence[int], num_top: int) -> None:
        self.token_ids = token_ids
        self.num_top = num_top
        assert token_ids, "a prompt has a token"
        self._tokens: list[SampledToken | None] = [None] * len(token_ids)
        self._tokens[0] = SampledToken(token_ids[0])
        self._num_missing = len(token_ids) - 1

    @property
    def is_complete(self) -> bool:
        """Whether every token but the first has been recorded."""
        return self._num_missing == 0

    @property
    def tokens(self) -> Sequence[SampledToken]:
        """The prompt, once complete; the first has no log probability, as nothing precedes it."""
        assert self.is_complete
        return tuple(token for token in self._tokens if token is not None)

    def targets(self, start: int, num_tokens: int) -> Sequence[int]:
        """The tokens that follow those at ``start`` and after, as far as they are of the prompt."""
        return self.token_ids[start + 1 : start + 1 + num_tokens]

    def record(self, start: int, tokens: Sequence[SampledToken]) -> None:
        """What was found for ``targets`` of a chunk that begins at ``start``."""
        for position, token in enumerate(tokens, start=start + 1):
            assert token.token_id == self.token_ids[position], "of another token"
            self._num_missing -= self._tokens[position] is None
            self._tokens[position] = token

    def __reduce__(self) -> tuple[type[PromptLogprobs], tuple[Sequence[int], int]]:
        """A copy in another process begins empty: nobody reads it."""
        return PromptLogprobs, (self.token_ids, self.num_top)
