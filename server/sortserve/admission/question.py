"""What the desk is asked: a newcomer, and where it may go (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sortserve.admission.outlook import Newcomer
from sortserve.core.request import Request
from sortserve.scheduling.objective import Worth

__all__ = ["Question"]


@dataclass(frozen=True)
class Question:
    """A newcomer, and where it may go."""

    request: Request
    alone: Newcomer
    """The same, as if nobody came with it."""
    allowed: tuple[int, ...]
    starts: tuple[int, ...]
    """Those of the allowed exits at which it may start."""
    num_sequences: int = 1
    """So many like it come at once, and bring as many times its worth."""
    num_siblings: int = 0
    """Of these, others for which there must be room as well: none once all were judged together."""

    @property
    def newcomer(self) -> Newcomer:
        """The request as a forecast takes it."""
        return replace(self.alone, num_siblings=self.num_siblings)

    @property
    def weight(self) -> float:
        """Of all that come, for they are taken together."""
        return self.request.weight * self.num_sequences

    def worth(self, worth: Worth) -> float:
        """What is lost if no answer is in time; nothing where no time is bound."""
        return self.alone.bounds_time * self.weight * worth.answer[self.starts[-1]]
