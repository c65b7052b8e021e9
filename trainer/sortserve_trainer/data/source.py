"""What ``--data`` names: a file or a data set, and how much of it an epoch sees."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from sortserve.core.errors import ConfigError

__all__ = ["DataSource", "bad_data", "file_digest", "parse_source"]

MAX_WEIGHT = 10_000


@dataclass(frozen=True)
class DataSource:
    """One ``--data`` argument."""

    reference: str
    """A file, or the id of a data set on the Hugging Face hub."""
    weight: float = 1.0
    """How many times each row is seen in an epoch; 0.5 is another half of the rows each epoch.
    Above 0 and finite."""

    def __post_init__(self) -> None:
        assert 0 < self.weight < math.inf


def parse_source(text: str) -> DataSource:
    """``PATH``, ``PATH:WEIGHT``, ``ORG/NAME`` or ``ORG/NAME:WEIGHT``.

    Raises:
        ConfigError: what follows the last colon is no number above 0, or nothing is before it.
    """
    reference, colon, suffix = text.rpartition(":")
    if not colon or "/" in suffix or os.path.exists(text):
        reference, weight = text, 1.0
    else:
        weight = _parse_weight(suffix, text)
    if not reference:
        raise bad_data(f"--data {text!r}", "names no data: give a file or a hub data set id")
    return DataSource(reference, weight)


def _parse_weight(suffix: str, text: str) -> float:
    try:
        weight = float(suffix)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= MAX_WEIGHT:
        raise bad_data(
            f"--data {text}",
            f"{suffix!r} is not a weight: after the colon comes a number above 0 and at most "
            f"{MAX_WEIGHT}, such as 0.5",
        )
    return weight


def bad_data(place: str, problem: str) -> ConfigError:
    """The one line that a user sees: ``place: problem.``, where a place is ``path:12``."""
    return ConfigError(f"{place}: {' '.join(problem.split())}.", param="data")


def file_digest(path: str | Path) -> str:
    """The sha256 of a data file in hexadecimal, for the recipe beside the weights.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise bad_data(str(path), f"cannot be read: {error.strerror}") from error
