"""Scores of a short answer against every accepted alias, as SQuAD and TriviaQA compute them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["AnswerScore", "normalise", "score_answer"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_QUOTES = "\u2018\u2019\u201c\u201d\u00b4"
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + _QUOTES, " "))


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """One answer against its aliases; each in [0, 1], the best over all aliases."""

    exact_match: float
    """1 where the answer is an alias, normalised."""
    f1: float
    """Harmonic mean of precision and recall over the words the answer shares with an alias."""
    contains: float
    """1 where an alias stands in the answer, word for word: kinder to models that answer in
    sentences."""


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score_answer(answer: str, aliases: Sequence[str]) -> AnswerScore:
    """``answer`` against every alias; only its first line that is not empty counts."""
    lines = [line for line in answer.splitlines() if line.strip()]
    given = normalise(lines[0]) if lines else ""
    accepted = [alias for alias in map(normalise, aliases) if alias]
    return AnswerScore(
        exact_match=float(given in accepted),
        f1=max((_f1(given.split(), alias.split()) for alias in accepted), default=0.0),
        contains=float(any(f" {alias} " in f" {given} " for alias in accepted)),
    )


def _f1(given: Sequence[str], alias: Sequence[str]) -> float:
    shared = sum((Counter(given) & Counter(alias)).values())
    # 2 / (1 / precision + 1 / recall)
    return 2 * shared / (len(given) + len(alias))
