"""When to try again, and after how long. Pure but for the jitter, which is passed in."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from sortserve_client._exceptions import (
    APIConnectionError,
    APIStatusError,
    BudgetUnattainableError,
    OverloadedError,
    SortserveError,
    UnavailableError,
)

__all__ = ["RetryPolicy", "parse_retry_after"]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Retries what cannot have run: no connection, 429 and 503.

    A budget that no exit can keep is not retried: its caller asked to be told at once, and the
    time for the answer would be over.
    """

    max_retries: int = 2
    max_wait_s: float = 30.0
    first_wait_s: float = 0.5
    """Doubles with each attempt when the server names no time."""
    jitter: Callable[[], float] = random.random
    """Uniform in [0, 1): moves a wait within the upper half of its length."""

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise ValueError(f"max_retries={self.max_retries} is not allowed: it must be >= 0.")
        if not self.max_wait_s >= 0:
            raise ValueError(f"max_retry_wait_s={self.max_wait_s} is not allowed: it must be >= 0.")

    def wait_s(self, error: SortserveError, attempt: int) -> float | None:
        """Seconds to wait after ``error``, or None to give up.

        Args:
            error: why the attempt failed.
            attempt: how many attempts failed before this one; 0 for the first.
        """
        if attempt >= self.max_retries or not _worth_retrying(error):
            return None
        asked_s = error.retry_after_s if isinstance(error, APIStatusError) else None
        if asked_s is not None:
            return min(asked_s, self.max_wait_s)
        backoff_s = min(self.first_wait_s * 2.0**attempt, self.max_wait_s)
        return backoff_s * (0.5 + 0.5 * self.jitter())


def _worth_retrying(error: SortserveError) -> bool:
    if isinstance(error, APIConnectionError):
        return error.transient and not error.sent
    if isinstance(error, BudgetUnattainableError):
        return False
    return isinstance(error, OverloadedError | UnavailableError)


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for: a number, or an HTTP date (RFC 9110, 10.2.3).

    Returns:
        Seconds from ``now`` (default: the clock), never negative; None if absent or unreadable.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return _seconds_until(value, now)
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _seconds_until(http_date: str, now: datetime | None) -> float | None:
    try:
        date = parsedate_to_datetime(http_date)
    except ValueError:
        return None
    if date.tzinfo is None:  # "-0000" parses to a naive date, and HTTP dates are in GMT
        date = date.replace(tzinfo=UTC)
    return max((date - (now or datetime.now(UTC))).total_seconds(), 0.0)
