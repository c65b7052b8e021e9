"""What is read through transformers: configuration, tokenizer, generation defaults."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as hf_logging

from sortserve.errors import CheckpointError
from sortserve.model.families import check_family

__all__ = ["generation_settings", "load_hf_config", "load_tokenizer", "quiet", "read_json"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings, log lines and progress bars off the user's terminal.

    Errors still pass. Loading is done by one thread, before anything is served.
    """
    verbosity, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if had_bars:
            hf_logging.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or no JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return document


def load_hf_config(folder: Path) -> Any:
    """The transformers config of a folder whose family is supported.

    Raises:
        CheckpointError: ``config.json`` is missing or malformed, or of another family.
    """
    path = folder / "config.json"
    raw_config = read_json(path)
    try:
        check_family(raw_config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.message}") from error
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers' validation raises
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not valid: {reason}") from error


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder.

    Raises:
        CheckpointError: there is none, or it does not load, or it is not a fast one.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder}: no tokenizer: none of {', '.join(_TOKENIZER_FILES)}.")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: the tokenizer does not load: {reason}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{folder}: only a slow tokenizer ({type(tokenizer).__name__}) is there; "
            "save a tokenizer.json with transformers."
        )
    return tokenizer


def generation_settings(
    folder: Path, hf_config: Any, tokenizer: Any
) -> tuple[frozenset[int], dict[str, float]]:
    """The ids that end a text, and the sampling defaults the checkpoint recommends.

    The ids are those of ``generation_config.json`` (else of the config) and the tokenizer's own.

    Raises:
        CheckpointError: ``generation_config.json`` is malformed.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    eos = generation.get("eos_token_id")
    ids = eos if eos is not None else getattr(hf_config, "eos_token_id", None)
    eos_ids = [*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id]
    defaults = {n: generation[n] for n in _SAMPLING_DEFAULTS if generation.get(n) is not None}
    return frozenset(int(i) for i in eos_ids if i is not None), defaults
