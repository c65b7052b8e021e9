"""``generation_config.json``: the ids that end a text, and the recommended sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from sortserve.checkpoint.files import read_optional_json
from sortserve.checkpoint.hf import quiet
from sortserve.core.errors import CheckpointError, InvalidRequestError
from sortserve.core.sampling_params import SamplingParams

__all__ = ["GENERATION_CONFIG", "generation_settings"]

GENERATION_CONFIG = "generation_config.json"
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_INTEGERS = ("top_k",)


def generation_settings(
    folder: Path, hf_config: Any, tokenizer: Any
) -> tuple[frozenset[int], dict[str, float]]:
    """The ids that end a text, and the sampling defaults the checkpoint recommends.

    The ids are those of ``generation_config.json`` (else of ``config.json``) and the tokenizer's
    own, as far as the model has it. Integers written as floats (``50.0``) are taken for integers.

    Raises:
        CheckpointError: a file is malformed, or a value is of another type or out of range; file
            and field are named.
    """
    path = folder / GENERATION_CONFIG
    generation = read_optional_json(path)
    _check_with_transformers(generation, path)
    vocab_size: int = hf_config.vocab_size
    ids, origin = generation.get("eos_token_id"), path
    if ids is None:
        ids, origin = getattr(hf_config, "eos_token_id", None), folder / "config.json"
    eos_ids = _token_ids(ids, vocab_size, origin) if ids is not None else set()
    own = tokenizer.eos_token_id
    if own is not None and own < vocab_size:
        eos_ids.add(own)
    return frozenset(eos_ids), _sampling_defaults(generation, path)


def _check_with_transformers(generation: Mapping[str, Any], path: Path) -> None:
    """Refuse what transformers refuses of the fields that are not used here."""
    others = {n: value for n, value in generation.items() if n not in _SAMPLING_DEFAULTS}
    try:
        with quiet():
            GenerationConfig.from_dict(others)
    except Exception as error:  # its validation raises many kinds
        raise CheckpointError(f"{path} is not valid: {error}") from error


def _token_ids(value: object, vocab_size: int, path: Path) -> set[int]:
    """One id or a list of them."""
    ids = [_integer(item) for item in (value if isinstance(value, list) else [value])]
    good = {token_id for token_id in ids if token_id is not None and 0 <= token_id < vocab_size}
    if not ids or good != set(ids):
        raise CheckpointError(
            f"{path}: eos_token_id={value!r} is not allowed: an id of the vocabulary, from 0 to "
            f"{vocab_size - 1}, or a list of them."
        )
    return good


def _sampling_defaults(generation: Mapping[str, Any], path: Path) -> dict[str, float]:
    defaults: dict[str, float] = {}
    for name in _SAMPLING_DEFAULTS:
        value = generation.get(name)
        if value is None:
            continue
        number = _integer(value) if name in _INTEGERS else _number(value)
        if number is None:
            kind = "an integer" if name in _INTEGERS else "a number"
            raise CheckpointError(f"{path}: {name}={value!r} is not allowed: {kind}.")
        try:
            SamplingParams(**{name: number})  # type: ignore[arg-type]
        except InvalidRequestError as error:
            raise CheckpointError(f"{path}: {error.message}") from error
        defaults[name] = number
    return defaults


def _integer(value: object) -> int | None:
    """An integer, or the one a float stands for; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    """A number that is no boolean; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else math.inf
