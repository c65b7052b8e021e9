"""Caps on what may wait: counted before tokenisation, so that a burst is refused while cheap."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from sortserve.core.errors import InvalidRequestError, OverloadedError

__all__ = ["QueueLimits", "Reservation"]


class Reservation:
    """A place in the queue. Given back once, by whoever comes first: ``release`` is idempotent.

    Any thread may call; the counts lie under the lock of ``QueueLimits``.
    """

    def __init__(self, limits: QueueLimits, num_requests: int, num_tokens: int) -> None:
        self._limits = limits
        self._num_requests = num_requests
        self._num_tokens = num_tokens

    def take_one(self, num_tokens: int) -> Reservation:
        """Move one request, with its true number of tokens now, to a reservation of its own."""
        with self._limits.lock:
            assert self._num_requests > 0
            share = self._num_tokens // self._num_requests
            self._num_requests -= 1
            self._num_tokens -= share
            self._limits.move(requests=0, tokens=num_tokens - share)
        return Reservation(self._limits, 1, num_tokens)

    def release(self) -> None:
        """Give the place back."""
        with self._limits.lock:
            self._limits.move(requests=-self._num_requests, tokens=-self._num_tokens)
            self._num_requests = self._num_tokens = 0

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class QueueLimits:
    """Owns the counts of requests and prompt tokens that wait; any thread may ask.

    A preempted request has left the queue once and does not count again.
    """

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._num_requests = 0
        self._num_tokens = 0
        self.lock = threading.Lock()

    def reserve(
        self, num_requests: int, num_tokens: int, *, retry_after_s: Callable[[int, int], float]
    ) -> Reservation:
        """Take places for some requests.

        An empty queue takes any one request, however long its prompt.

        Args:
            num_requests: sequences.
            num_tokens: of their prompts together.
            retry_after_s: seconds until so many requests and tokens have left the queue.

        Raises:
            InvalidRequestError: it is more requests than may ever wait.
            OverloadedError: a cap would be passed; 429 with Retry-After.
        """
        if num_requests > self._max_requests:
            raise InvalidRequestError(
                f"n makes {num_requests} sequences of this request, but only {self._max_requests} "
                "may wait at once. Ask for fewer.",
                param="n",
            )
        with self.lock:
            requests = self._num_requests + num_requests
            tokens = self._num_tokens + num_tokens
            full = requests > self._max_requests
            if full or (tokens > self._max_tokens and self._num_requests > 0):
                what, have, cap = (
                    ("requests", requests, self._max_requests)
                    if full
                    else ("prompt tokens", tokens, self._max_tokens)
                )
                raise OverloadedError(
                    f"The queue is full: with this request {have} {what} would wait, "
                    f"{cap} may. Come back later.",
                    retry_after_s=retry_after_s(
                        requests - self._max_requests, tokens - self._max_tokens
                    ),
                )
            self._num_requests, self._num_tokens = requests, tokens
        return Reservation(self, num_requests, num_tokens)

    def move(self, *, requests: int, tokens: int) -> None:
        """Change the counts; the caller, a reservation, holds the lock."""
        self._num_requests += requests
        self._num_tokens += tokens
        assert self._num_requests >= 0
