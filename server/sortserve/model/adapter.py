"""A PEFT adapter over its base, merged into plain weights at load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sortserve.errors import CheckpointError
from sortserve.model.hf import quiet, read_json
from sortserve.model.loader import SafetensorsReader

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "adapter_base", "merge_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_base(folder: Path) -> str:
    """What ``adapter_config.json`` names as the base.

    Raises:
        CheckpointError: it is malformed, names no base, or is not LoRA.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(
            f"{folder}: PEFT type {peft_type!r} is not supported; supported: LORA."
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder}: {ADAPTER_CONFIG} has no base_model_name_or_path.")
    return base


def merge_adapter(folder: Path, base: Path) -> Mapping[str, Tensor]:
    """The state dict of the base folder's model with the adapter merged in, in fp32.

    Merging in fp32 rounds once, when the weights are converted, whatever is served.

    Raises:
        CheckpointError: the adapter does not fit its base, or its weights are missing or bad.
    """
    # peft imports bitsandbytes where it is installed, which tells of kernels it would download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with SafetensorsReader([folder / ADAPTER_WEIGHTS], str(folder)) as reader:
        given = set(reader.shapes)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, local_files_only=True
            )
            adapted = PeftModel.from_pretrained(model, str(folder))
            _check_fit(adapted, given, folder, base)
            merged = adapted.merge_and_unload()
    except CheckpointError:
        raise
    except Exception as error:  # peft and safetensors raise many kinds
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{folder}: the adapter cannot be merged into {base}: {reason}"
        ) from error
    state_dict: Mapping[str, Tensor] = merged.state_dict()
    return state_dict


def _check_fit(adapted: Any, given: set[str], folder: Path, base: Path) -> None:
    """Refuse what peft lets pass in silence: tensors left out, left over, or tied to others."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(expected - given):
        raise CheckpointError(f"{folder}: tensor {missing[0]} of the adapter is missing.")
    if extra := sorted(given - expected):
        raise CheckpointError(
            f"{folder}: tensor {extra[0]} of the adapter has no place in its base, {base}."
        )
    changes_head = any("lm_head" in name or "embed_tokens" in name for name in expected)
    if changes_head and adapted.get_base_model().config.tie_word_embeddings:
        raise CheckpointError(
            f"{folder}: the adapter changes lm_head or embed_tokens, which are one tensor in "
            f"{base}, so it cannot be merged; train it on an untied base."
        )
