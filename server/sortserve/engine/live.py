"""A live request: its sequence, its text, and what is done where the text cannot be made."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from sortserve.admission.choose import ExitChoice
from sortserve.admission.lengths import LengthEstimator, LengthKey
from sortserve.core.budget import ExitTable
from sortserve.core.grammar import Constraint
from sortserve.core.request import FinishReason, Request, RequestReport
from sortserve.core.sequence import Sequence
from sortserve.engine.finish import make_report

__all__ = [
    "Live",
    "TextError",
    "TextStream",
    "learn_length",
    "push",
    "report_of",
    "rest",
    "sequence_of",
]

logger = logging.getLogger(__name__)


class TextStream(Protocol):
    """Tokens in, text out (see ``sortserve.text.tokenizer.TextStream``)."""

    def push(self, token_id: int) -> tuple[str, bool]:
        """New text, and whether a stop string ended it."""

    def finish(self) -> str:
        """The text held back so far."""


@dataclass(frozen=True)
class Live:
    """A live request: its sequence, its text, and whether its budget was promised."""

    sequence: Sequence
    text: TextStream
    promised: bool


class TextError(Exception):
    """The text of one request could not be made."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


def sequence_of(
    request: Request, choice: ExitChoice, *, seed: int, eos_token_ids: frozenset[int]
) -> Sequence:
    """A sequence that has not begun.

    Args:
        request: validated.
        choice: where it starts, and what it was promised.
        seed: the client's, or one drawn for it; each of n samples moves it.
        eos_token_ids: end the request unless it ignores them.
    """
    sampling = request.sampling
    eos = frozenset() if sampling.ignore_eos else eos_token_ids
    return Sequence(
        request,
        exit_layer=choice.exit_layer,
        seed=seed + request.sample_index,
        stop_token_ids=eos | frozenset(sampling.stop_token_ids),
        estimate=choice.estimate,
        floor_layer=choice.floor_layer,
        promise=choice.promise,
        schedule=choice.schedule,
        constraint=_constraint_of(request, eos_token_ids),
    )


def _constraint_of(request: Request, eos_token_ids: frozenset[int]) -> Constraint | None:
    """A grammar's first place. Log probabilities need a step for every token, forced or not."""
    if request.grammar is None:
        return None
    sampling = request.sampling
    return Constraint(
        request.grammar.start(),
        one_by_one=sampling.logprobs is not None,
        no_ends=eos_token_ids - set(sampling.stop_token_ids) if sampling.ignore_eos else (),
    )


def push(live: Live, token_id: int) -> tuple[str, bool]:
    """The text that a token adds, and whether a stop string ended it."""
    try:
        return live.text.push(token_id)
    except Exception as error:
        logger.exception("the text of request %s failed", live.sequence.request_id)
        raise TextError(type(error).__name__) from error


def rest(live: Live) -> str:
    """The text held back so far."""
    try:
        return live.text.finish()
    except Exception as error:
        logger.exception("the text of request %s lacks its end", live.sequence.request_id)
        raise TextError(type(error).__name__) from error


def report_of(
    live: Live, reason: FinishReason, *, exits: ExitTable, now: float
) -> RequestReport | None:
    """What is told of a request that ends now; None if that fails, for its answer does not."""
    try:
        return make_report(live.sequence, reason, exits=exits, now=now, promised=live.promised)
    except Exception:
        logger.exception("there is no report of request %s", live.sequence.request_id)
        return None


def learn_length(lengths: LengthEstimator, sequence: Sequence, *, cut: bool) -> None:
    """Let the length of an answer be learned; if that fails, nothing else does."""
    try:
        key = LengthKey.of(sequence.request)
        lengths.observe(sequence.num_sampled_tokens, cut=cut, key=key)
        grammar, num_tokens = sequence.request.grammar, sequence.num_output_tokens
        if grammar is not None:
            lengths.observe_forced(sequence.num_sampled_tokens, num_tokens, grammar.key)
    except Exception:
        logger.exception("nothing was learned of the length of an answer")
