"""The file of API keys: who may ask, and what each key's requests are worth."""

from __future__ import annotations

from pathlib import Path

from sortserve.core.weights import WEIGHT, KeyWeights, read_weight
from sortserve.process.sources import read_small_file

__all__ = ["read_keys"]

OPTIONS = {"default": "default", "max": "most"}
"""As a line spells them, and as ``KeyWeights`` does."""


def read_keys(path: Path) -> dict[str, KeyWeights]:
    """The keys of a file of lines ``KEY``, or ``KEY default=0.5 max=1``.

    Empty lines and lines that start with ``#`` are skipped. A key has no spaces.

    Raises:
        ConfigError: the file cannot be read.
        ValueError: a line is wrong; the message has its number and never a key.
    """
    keys: dict[str, KeyWeights] = {}
    for number, line in enumerate(read_small_file(path, "api_key_file").splitlines(), start=1):
        key, *options = line.split() or ["#"]
        if key.startswith("#"):
            continue
        where = f"--api-key-file {path}, line {number}"
        if not all(map(str.isprintable, (key, *options))):
            raise ValueError(f"{where} holds control characters")
        weights = _weights(options, where)
        if keys.setdefault(key, weights) != weights:
            raise ValueError(f"{where} has a key that an earlier line gives other weights")
    return keys


def _weights(options: list[str], where: str) -> KeyWeights:
    """The options after a key. What is wrong is not quoted: it may be half of a secret."""
    given: dict[str, float] = {}
    for option in options:
        name, _, text = option.partition("=")
        if name not in OPTIONS:
            raise ValueError(f"{where}: after the key there may be default=WEIGHT and max=WEIGHT")
        value = read_weight(text)
        if value is None:
            raise ValueError(f"{where}: {name} should be {WEIGHT.allowed}")
        if OPTIONS[name] in given:
            raise ValueError(f"{where} has {name} twice")
        given[OPTIONS[name]] = value
    weights = KeyWeights(**given)
    if weights.default is not None and weights.most is not None and weights.default > weights.most:
        raise ValueError(f"{where}: default={weights.default:g} is above max={weights.most:g}")
    return weights
