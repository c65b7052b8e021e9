"""A decision that failed is replaced by a plain one; this tells of it (no torch)."""

from __future__ import annotations

import logging

__all__ = ["LOG_EVERY_S", "FailureLog"]

LOG_EVERY_S = 60.0
"""A decision that keeps failing is written down so often at most."""


class FailureLog:
    """Writes down the first failure, and at most one a minute after it, each with its traceback.

    A policy that fails may fail a thousand times a second.

    Args:
        logger: where to.
        what: what failed and what stood in, as a sentence.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._num_unwritten = 0
        self._written_s: float | None = None

    def add(self, error: Exception, now: float) -> None:
        """Count a failure.

        Args:
            error: what was raised.
            now: the engine's clock.
        """
        self._num_unwritten += 1
        if self._written_s is not None and now - self._written_s < LOG_EVERY_S:
            return
        self._logger.error(
            "%s (%d since the last such line)", self._what, self._num_unwritten, exc_info=error
        )
        self._num_unwritten, self._written_s = 0, now
