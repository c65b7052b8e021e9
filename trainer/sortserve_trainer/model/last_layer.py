"""The weights of a trunk's last layer, as a new exit module of kind ``layer`` starts from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sortserve_trainer.model.whole_layer import LAYER_NAMES

__all__ = ["last_layer_tensors"]


@torch.no_grad()
def last_layer_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Its tensors in float32, named as those of ``layer`` modules, without their ``norm.weight``.

    Args:
        layer: a decoder layer of transformers, whose linear layers peft may have wrapped (their
            LoRA is merged) or bitsandbytes quantised (they are dequantised).
    """
    modules = dict(layer.named_modules())
    tensors = {}
    for own, plain in LAYER_NAMES.items():
        module_name, _, part = plain.rpartition(".")
        tensor = _tensor(modules.get(module_name), part)
        if tensor is not None:
            tensors[own] = tensor.float()
    return tensors


def _tensor(module: Any, part: str) -> Tensor | None:
    base = getattr(module, "base_layer", module)
    tensor: Tensor | None = getattr(base, part, None)
    if tensor is None or part != "weight" or base is module:
        return tensor
    from peft.utils.integrations import dequantize_module_weight

    merged: Tensor = dequantize_module_weight(base).float()
    for name in module.active_adapters:
        merged = merged + module.get_delta_weight(name).to(merged)
    return merged
