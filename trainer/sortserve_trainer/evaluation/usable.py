"""Whether the answers of an exit are fit to be read: ``usable`` of ``sorted.json``.

An exit is judged beside the full depth of the same model, by what was measured of both:

* from held-out text: its score is at least ``MIN_SCORE``, a loss at most ln 2 above that of the
  full depth;
* from greedy answers to prompts: they repeat 4-grams at most ``MAX_MORE_REPETITION`` more often,
  and at most ``MAX_MORE_LOOPS`` more of them end in a loop.

What was not measured does not count; an exit of which neither was measured is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["is_usable"]

MIN_SCORE = 0.5
"""Below it the true next token is, in the geometric mean, less than half as likely."""
MAX_MORE_REPETITION = 0.15
"""In shares of 4-grams: about the difference between prose and a list that goes round."""
MAX_MORE_LOOPS = 0.1
"""In shares of answers."""


def is_usable(metrics: Mapping[str, float], full: Mapping[str, float]) -> bool | None:
    """Whether an exit is fit to be used; None where nothing that tells was measured.

    Args:
        metrics: of the exit, by the names of ``summarise``.
        full: of the full depth.
    """
    verdicts = []
    if "score" in metrics:
        verdicts.append(metrics["score"] >= MIN_SCORE)
    for name, limit in (("repetition", MAX_MORE_REPETITION), ("loop_rate", MAX_MORE_LOOPS)):
        if name in metrics and name in full:
            verdicts.append(metrics[name] - full[name] <= limit)
    return all(verdicts) if verdicts else None
