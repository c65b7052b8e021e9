"""What a run comes to: one way of judging it, for real requests and for simulated ones.

The figure that counts is **quality-weighted goodput**: of each arrival the mean ``score`` over the
tokens delivered if its budget was met, and 0 if it was not, was refused or failed; times its
weight, summed, over the sum of the weights. 1 is every answer at full depth, in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Graded", "effective_scores", "grade", "share"]


@dataclass(frozen=True, kw_only=True)
class Graded:
    """One arrival, and what became of it."""

    class_name: str
    met: bool | None
    """Whether its budget was; None: it had none, and counts for nothing but the means."""
    refused: bool
    tokens_by_exit: Mapping[int, int]
    """Output tokens that were delivered."""
    weight: float = 1.0

    def quality(self, scores: Mapping[int, float]) -> float:
        """The mean score over its tokens if its budget was met, else 0."""
        num_tokens = sum(self.tokens_by_exit.values())
        if not self.met or not num_tokens:
            return 0.0
        return sum(scores[e] * n for e, n in self.tokens_by_exit.items()) / num_tokens


def effective_scores(scores: Mapping[int, float | None]) -> dict[int, float]:
    """Each exit's score: the measured one, or the share of the layers, as the server counts it."""
    full = max(scores)
    own = {e: e / full if score is None else score for e, score in sorted(scores.items())}
    return own | {full: 1.0}


def grade(
    requests: Sequence[Graded], scores: Mapping[int, float], class_names: Sequence[str]
) -> dict[str, Any]:
    """The figures of a run; None where nobody is who they are about.

    Args:
        requests: every arrival.
        scores: of each exit, full depth among them.
        class_names: of the classes that are told apart.
    """
    counted = [r for r in requests if r.met is not None]
    num_met = sum(bool(r.met) for r in counted)
    num_refused = sum(r.refused for r in counted)
    by_class = {name: [r for r in counted if r.class_name == name] for name in class_names}
    tokens = [item for r in requests for item in r.tokens_by_exit.items()]
    num_tokens = sum(n for _, n in tokens)
    return {
        "quality_goodput": _quality_goodput(counted, scores),
        "goodput_share": share(num_met, len(counted)),
        "met_of_admitted": share(num_met, len(counted) - num_refused),
        "refused_share": share(num_refused, len(counted)),
        "quality_by_class": {n: _quality_goodput(own, scores) for n, own in by_class.items()},
        "by_class": {n: share(sum(bool(r.met) for r in o), len(o)) for n, o in by_class.items()},
        "mean_depth_share": share(sum(e * n for e, n in tokens), num_tokens * max(scores)),
        "mean_score": share(sum(scores[e] * n for e, n in tokens), num_tokens),
    }


def _quality_goodput(requests: Sequence[Graded], scores: Mapping[int, float]) -> float | None:
    worth = sum(r.weight * r.quality(scores) for r in requests)
    return share(worth, sum(r.weight for r in requests))


def share(part: float, whole: float) -> float | None:
    """A part of a whole, if there is one."""
    return round(part / whole, 4) if whole else None
