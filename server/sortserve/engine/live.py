"""A live request: its sequence, its text, and what is done where the text cannot be made."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from sortserve.core.sequence import Sequence

__all__ = ["Live", "TextError", "TextStream", "push", "rest"]

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
