"""The exits of a checkpoint, read without its weights."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from sortserve.checkpoint.exit_table import exit_table
from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.hf import load_hf_config
from sortserve.checkpoint.known_exits import known_exits
from sortserve.checkpoint.layout import lay_out
from sortserve.checkpoint.sources import resolve_source
from sortserve.core.budget import ExitTable

__all__ = ["exits_of"]


def exits_of(source: str) -> tuple[str, ExitTable]:
    """The name of a checkpoint, and what each of its exits costs and how good it is.

    Args:
        source: as in ``load_checkpoint``. A GGUF file that was never read is converted first.

    Raises:
        CheckpointError: there is no such checkpoint, or its ``config.json`` is not supported.
    """
    with ExitStack() as stack:
        layout = lay_out(resolve_source(source), lambda: torch.float32, stack, with_weights=False)
        config = read_model_config(load_hf_config(layout.model))
        layers = known_exits(layout, config).served
    return layout.name, exit_table(config, layout.sorted_info, layers)
