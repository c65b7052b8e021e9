"""Do all ranks still get on, and in step? (no torch)

A step is one sequence of collectives on all ranks. Whoever leaves it early, by an error, leaves the
others waiting, unless all leave at the same place: a plan that cannot be run fails on every rank
alike, and then they are in step again, and only the guilty request need end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sortserve.engine.stall import StallDetector
from sortserve.engine.tensor_parallel.messages import Done

__all__ = ["GRACE_S", "StepWatch"]

GRACE_S = 10.0
"""Seconds in which all ranks must have left a step that failed on one of them."""


@dataclass(frozen=True)
class _End:
    """How rank 0 left a step."""

    number: int
    num_calls: int
    failed: bool


class StepWatch:
    """Told what ranks do, it says when the group is lost. The caller sees to threads.

    Args:
        ranks: the others.
        timeout_s: a rank that is at one step for so long is lost; None: never.
        poll_s: how often ``fault`` is called, at most that far apart.
    """

    def __init__(self, ranks: Iterable[int], timeout_s: float | None, poll_s: float) -> None:
        self._done = {rank: Done(0, 0, None) for rank in ranks}
        self._begun = 0
        self._ended = _End(0, 0, failed=False)
        self._timeout_s = timeout_s
        self._detector = None if timeout_s is None else StallDetector(timeout_s, poll_s)
        self._failed_s: float | None = None
        self._failed_alone: str | None = None

    def begin(self) -> int:
        """Rank 0 sends a step; returns its number."""
        self._begun += 1
        return self._begun

    def end(self, num_calls: int, *, failed: bool) -> None:
        """Rank 0 has left the step that it sent last.

        Args:
            num_calls: collectives that it took part in.
            failed: it raised.
        """
        self._ended = _End(self._begun, num_calls, failed)

    def note(self, rank: int, done: Done) -> None:
        """Another rank has left a step."""
        self._done[rank] = done
        if done.error is not None and done.number < self._begun:
            # Rank 0 has begun another: where a step fails it waits for all ranks first.
            self._failed_alone = self._failed_alone or _failed_alone(rank, done.error)

    @property
    def is_together(self) -> bool:
        """Whether all ranks have left the last step, each after as many collectives."""
        return self._ended.number == self._begun and all(
            done.number == self._begun and done.num_calls == self._ended.num_calls
            for done in self._done.values()
        )

    def fault(self, now: float) -> str | None:
        """Why the group is lost; None: it is not.

        Args:
            now: any monotonic clock, in seconds.
        """
        return self._failed_alone or self._failure(now) or self._stall(now)

    def _failure(self, now: float) -> str | None:
        errors = {
            rank: done.error
            for rank, done in self._done.items()
            if done.number == self._begun and done.error is not None
        }
        has_left = self._ended.number == self._begun
        failed_here = has_left and self._ended.failed
        if not errors and not failed_here:
            self._failed_s = None
            return None
        if has_left and not self._ended.failed:
            rank, error = next(iter(errors.items()))
            return _failed_alone(rank, error)
        if self.is_together:
            self._failed_s = None
            return None
        if self._failed_s is None:
            self._failed_s = now
        if now - self._failed_s <= GRACE_S:
            return None
        who = "rank 0" if failed_here else f"rank {next(iter(errors))}"
        return f"{who} failed in a step that others have not left, or not at the same place"

    def _stall(self, now: float) -> str | None:
        behind = [rank for rank, done in self._done.items() if done.number < self._begun]
        if self._detector is None:
            return None
        if not self._detector.look(self._begun if behind else None, now):
            return None
        return f"rank {behind[0]} has been at one step for {self._timeout_s:g} s"


def _failed_alone(rank: int, error: str | None) -> str:
    return f"rank {rank} failed in a step that rank 0 did not: {error}"
