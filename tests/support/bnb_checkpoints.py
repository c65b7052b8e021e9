"""Tiny checkpoints that transformers and bitsandbytes have quantised and saved.

make_quantised_checkpoint(tmp_path, "llama-tied", load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = load_quantised_hf(tmp_path)     # transformers' own model of it
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from support.tiny_models import make_tiny_checkpoint

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = ["BNB_CONFIGS", "load_quantised_hf", "make_quantised_checkpoint", "needs_bitsandbytes"]

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="the extra `quant` is not installed"
)
"""Of a module: importing the library takes seconds, and only who runs its tests shall pay them."""

BNB_CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "mixed": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["k_proj", "down_proj", "lm_head"],
    },
    "int8-mixed": {"load_in_8bit": True, "llm_int8_skip_modules": ["up_proj", "lm_head"]},
}
"""Arguments of ``BitsAndBytesConfig``, by a name of ours."""


def make_quantised_checkpoint(
    folder: Path,
    variant: str = "llama-tied",
    exits: Sequence[int] | None = (2, 4, 6),
    exit_kinds: Mapping[int, str] | None = None,
    **config: Any,
) -> Path:
    """``make_tiny_checkpoint``, its linear layers quantised; ``config`` as in BNB_CONFIGS."""
    make_tiny_checkpoint(folder, variant, exits, exit_kinds)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**config)
    )
    draft = folder.with_name(f"{folder.name}-draft")
    model.save_pretrained(draft)
    for name in ("model.safetensors", "config.json"):
        (draft / name).replace(folder / name)
    shutil.rmtree(draft)
    return folder


def load_quantised_hf(folder: Path) -> Any:
    """Transformers' own model of a quantised folder, fp32.

    Its quantised layers stay in training mode, in which bitsandbytes computes with the dequantised
    matrices in the dtype of the inputs. In eval mode it rounds the inputs, too.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            module.train()
            module.train = lambda mode=True, module=module: module
    return model.eval()
