"""A sampled token joins its request, with those that its grammar forces after it (no torch)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sortserve.core.grammar import GrammarError
from sortserve.core.request import FinishReason
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.finish import would_overrun
from sortserve.engine.live import Live, TextError, push

__all__ = ["Accepted", "accept", "row_failure"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accepted:
    """What a step brought one request."""

    text: str
    tokens: tuple[SampledToken, ...]
    """The sampled one first."""
    reason: FinishReason | None
    """Why the request ends with the last of them; None: it goes on."""


def accept(live: Live, token: SampledToken, exit_layer: int, now: float) -> Accepted:
    """Add a token, and what is forced after it, up to the first that ends the request.

    Raises:
        TextError: its text cannot be made.
        GrammarError: its grammar cannot go on.
    """
    sequence = live.sequence
    previous_s = sequence.last_token_s
    sequence.last_token_s = now
    if sequence.first_token_s is None:
        sequence.first_token_s = now
    text, reason = _take(live, token.token_id, exit_layer, forced=False)
    tokens: tuple[SampledToken, ...] = (token,)
    constraint = sequence.constraint
    if constraint is not None:
        while reason is None and (token_id := constraint.next_forced()) is not None:
            more, reason = _take(live, token_id, exit_layer, forced=True)
            tokens, text = (*tokens, SampledToken(token_id)), text + more
    if reason is None and would_overrun(sequence, previous_s, now):
        reason = FinishReason.DEADLINE
    return Accepted(text, tokens, reason)


def _take(
    live: Live, token_id: int, exit_layer: int, *, forced: bool
) -> tuple[str, FinishReason | None]:
    """Add one token: its text, and whether the request ends with it."""
    sequence = live.sequence
    sequence.append_token(token_id, exit_layer, forced=forced)
    if token_id in sequence.stop_token_ids:
        return "", FinishReason.STOP
    text, stopped = push(live, token_id)
    if stopped:
        return text, FinishReason.STOP
    constraint = sequence.constraint
    if constraint is not None:
        constraint.accept(token_id)
        if constraint.is_complete:
            return text, FinishReason.STOP
    if len(sequence.output_token_ids) >= sequence.request.sampling.max_tokens:
        return text, FinishReason.LENGTH
    return text, None


def row_failure(error: Exception, request_id: str) -> RowFailure:
    """Why a request ends that could not be given its token; what nobody foresaw is logged."""
    if isinstance(error, TextError):
        return RowFailure("text", error.detail)
    if isinstance(error, GrammarError):
        return RowFailure("grammar", str(error))
    logger.error("request %s could not be given its token", request_id, exc_info=error)
    return RowFailure("exception", type(error).__name__)
