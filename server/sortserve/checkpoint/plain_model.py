"""Transformers' own model of a checkpoint, in plain weights whatever it is stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.hf import build_skeleton, load_hf_config
from sortserve.checkpoint.loader import open_trunk

__all__ = ["load_plain_model"]


def load_plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model that one may change: merge an adapter into it, train it.

    Quantised matrices come as those they stand for, in fp32 before they are rounded to ``dtype``.

    Args:
        folder: of a plain Hugging Face checkpoint.
        dtype: of the weights.

    Raises:
        CheckpointError: a tensor is missing or bad, or the checkpoint is not supported.
        OSError: transformers cannot read the weights.
    """
    from transformers import AutoModelForCausalLM

    hf_config = load_hf_config(folder)
    if getattr(hf_config, "quantization_config", None) is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    with open_trunk(folder, read_model_config(hf_config)) as (reader, config):
        state_dict = {name: reader.read(name).to(dtype, copy=True) for name in reader.shapes}
    del hf_config.quantization_config
    hf_config.tie_word_embeddings = config.tie_word_embeddings
    # The auto class wants a folder to look for code in; the model's own class does not.
    model_class = type(build_skeleton(hf_config))
    return model_class.from_pretrained(None, config=hf_config, state_dict=state_dict, dtype=dtype)
