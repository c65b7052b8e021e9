"""What is read through transformers: configuration and tokenizer, each looked at before."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as hf_logging

from sortserve.checkpoint.families import check_family
from sortserve.checkpoint.files import read_json
from sortserve.checkpoint.tokenizer_files import (
    FAST_TOKENIZER,
    TOKENIZER_CONFIG,
    check_tokenizer_files,
    held_stderr,
    how_to_convert,
    try_out_tokenizer,
)
from sortserve.core.errors import CheckpointError
from sortserve.model.config_fields import check_fields
from sortserve.model.rope import check_raw_rope

__all__ = ["build_skeleton", "load_hf_config", "load_tokenizer", "quiet"]


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


def load_hf_config(folder: Path) -> Any:
    """The transformers config of a folder whose family is supported.

    Raises:
        CheckpointError: ``config.json`` is missing or malformed, or of another family.
    """
    path = folder / "config.json"
    raw_config = read_json(path)
    try:
        check_family(raw_config)
        check_fields(raw_config)
        check_raw_rope(raw_config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever transformers' validation raises
        raise CheckpointError(f"{path} is not valid: {error}") from error


def build_skeleton(hf_config: Any) -> Any:
    """The transformers model of a config, without weights: its modules, names and shapes.

    Raises:
        CheckpointError: transformers builds none from this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config)
    except Exception as error:  # whatever its layers raise
        raise CheckpointError(f"transformers cannot build the model: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder: transformers' ``PreTrainedTokenizerFast``.

    Raises:
        CheckpointError: there is none, or it does not load or work, or it is not a fast one.
    """
    check_tokenizer_files(folder)
    try:
        with held_stderr(), quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            if tokenizer.is_fast:
                try_out_tokenizer(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics beyond it
        if not (folder / FAST_TOKENIZER).is_file():
            raise CheckpointError(how_to_convert(folder)) from error
        raise CheckpointError(
            f"{folder}: the tokenizer does not load: {error} "
            f"(in {FAST_TOKENIZER} or {TOKENIZER_CONFIG})"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG}: only a slow tokenizer ({type(tokenizer).__name__}) is "
            f"there; save a {FAST_TOKENIZER} with transformers."
        )
    return tokenizer
