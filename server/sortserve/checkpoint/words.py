"""What a checkpoint's tokens mean: its tokenizer, chat template and recommended sampling."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.generation_config import generation_settings
from sortserve.checkpoint.hf import load_hf_config, load_tokenizer
from sortserve.checkpoint.layout import CheckpointLayout, lay_out
from sortserve.checkpoint.sources import resolve_source
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ModelConfig
from sortserve.text.chat_template import ChatTemplate
from sortserve.text.template_renderer import shared_renderer

__all__ = ["Words", "load_words", "open_words"]

logger = logging.getLogger(__name__)


class Words(NamedTuple):
    """What a checkpoint's tokens mean; see ``load.LoadedCheckpoint``."""

    tokenizer: Any
    chat_template: ChatTemplate
    eos_token_ids: frozenset[int]
    generation_defaults: Mapping[str, float]


def load_words(layout: CheckpointLayout, hf_config: Any, config: ModelConfig) -> Words:
    """What a checkpoint makes of text, and how it recommends to sample.

    Args:
        layout: where its files are.
        hf_config: transformers' config of it.
        config: the architecture.

    Raises:
        CheckpointError: the tokenizer or the chat template is bad.
    """
    tokenizer, chat_template = _load_tokenizer(layout, config)
    eos_token_ids, defaults = generation_settings(layout.model, hf_config, tokenizer)
    return Words(tokenizer, chat_template, eos_token_ids, defaults)


def open_words(source: str, *, revision: str | None = None) -> tuple[Words, ModelConfig]:
    """What a checkpoint makes of text, and its architecture, for who has no use for its weights.

    Args:
        source: as ``load_checkpoint`` takes it.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not supported.
    """
    found = resolve_source(source, revision=revision)
    with ExitStack() as stack:
        layout = lay_out(found, lambda: torch.float32, stack, with_weights=False)
        hf_config = load_hf_config(layout.model)
        config = read_model_config(hf_config)
        return load_words(layout, hf_config, config), config


def _load_tokenizer(layout: CheckpointLayout, config: ModelConfig) -> tuple[Any, ChatTemplate]:
    """The tokenizer of the named folder, else that of its base, and its chat template."""
    has_own = layout.own != layout.model and (layout.own / "tokenizer.json").is_file()
    folder = layout.own if has_own else layout.model
    shared_renderer().start()  # it loads while the tokenizer does
    tokenizer = load_tokenizer(folder)
    chat_template = ChatTemplate(tokenizer)
    if not chat_template.exists:
        shared_renderer().close()
    try:
        chat_template.prepare()
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.message}") from error
    if len(tokenizer) > config.vocab_size:
        logger.warning(
            "The tokenizer has %d tokens, the model only %d: the last ones cannot be used.",
            len(tokenizer),
            config.vocab_size,
        )
    return tokenizer, chat_template
