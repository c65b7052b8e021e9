"""A PEFT adapter over its base, merged into plain weights at load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sortserve.checkpoint.adapter_config import (
    ADAPTER_CONFIG,
    check_adapter_config,
    quieten_bitsandbytes,
    read_adapter_config,
)
from sortserve.checkpoint.hf import quiet
from sortserve.checkpoint.plain_model import load_plain_model
from sortserve.checkpoint.tensors import SafetensorsReader
from sortserve.core.errors import CheckpointError

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "adapter_base", "check_adapter", "merge_adapter"]

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_base(folder: Path) -> str:
    """What ``adapter_config.json`` names as the base.

    Raises:
        CheckpointError: it is malformed, names no base, or cannot be merged.
    """
    base: str = read_adapter_config(folder)["base_model_name_or_path"]
    return base


def check_adapter(folder: Path, base: Path, skeleton: Any) -> None:
    """Compare the adapter with its base, before any weights are read.

    The adapter is put on a base without weights, to learn which tensors peft will look for.

    Args:
        folder: of the adapter.
        base: the folder of its base, for messages.
        skeleton: transformers' model of the base, without weights; it is changed.

    Raises:
        CheckpointError: the adapter cannot be merged or does not fit its base, or its weights are
            missing or bad.
    """
    quieten_bitsandbytes()
    from peft import PeftConfig, get_peft_model

    check_adapter_config(folder, [name for name, _ in skeleton.named_modules()])
    with SafetensorsReader([folder / ADAPTER_WEIGHTS], str(folder)) as reader:
        given = reader.shapes
    try:
        with quiet():
            config = PeftConfig.from_pretrained(str(folder))
            adapted = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    except Exception as error:  # peft raises many kinds
        raise CheckpointError(
            f"{folder}: the adapter cannot be merged into {base}: {error}"
        ) from error
    _check_fit(adapted, given, folder, base)


def merge_adapter(folder: Path, base: Path) -> Mapping[str, Tensor]:
    """The state dict of the base folder's model with the adapter merged in, in fp32.

    Merging in fp32 rounds once, when the weights are converted, whatever is served. A quantised
    base counts as the matrices it stands for, so that the result is what the adapter was trained
    on top of.

    Args:
        folder: of an adapter that ``check_adapter`` has accepted.
        base: the folder of its base.

    Raises:
        CheckpointError: peft cannot merge the two.
    """
    quieten_bitsandbytes()
    from peft import PeftModel

    try:
        with quiet():
            model = load_plain_model(base)
            merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except CheckpointError:
        raise
    except Exception as error:  # peft and safetensors raise many kinds
        raise CheckpointError(
            f"{folder}: the adapter cannot be merged into {base}: {error}"
        ) from error
    state_dict: Mapping[str, Tensor] = merged.state_dict()
    return state_dict


def _check_fit(
    adapted: Any, given: Mapping[str, tuple[int, ...]], folder: Path, base: Path
) -> None:
    """Refuse what peft lets pass in silence: tensors left out, left over, or tied to others."""
    from peft import get_peft_model_state_dict

    with quiet():
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := sorted(set(expected) - set(given)):
        raise CheckpointError(f"{folder}: tensor {missing[0]} of the adapter is missing.")
    if extra := sorted(set(given) - set(expected)):
        raise CheckpointError(
            f"{folder}: tensor {extra[0]} of the adapter has no place in its base, {base}."
        )
    for name, shape in given.items():
        if shape != (wanted := tuple(expected[name].shape)):
            raise CheckpointError(
                f"{folder}: the adapter cannot be merged into {base}: tensor {name} has shape "
                f"{list(shape)}, where {list(wanted)} is wanted."
            )
    changes_head = any("lm_head" in name or "embed_tokens" in name for name in expected)
    if changes_head and adapted.get_base_model().config.tie_word_embeddings:
        raise CheckpointError(
            f"{folder}: the adapter changes lm_head or embed_tokens, which are one tensor in "
            f"{base}, so it cannot be merged; train it on an untied base."
        )
