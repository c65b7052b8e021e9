"""RMSNorm in one operation, where transformers' own takes eight: for a GPU.

A GPU computes a small model faster than the host can ask for it, and a trunk of 30 layers has 61
norms. torch's operation computes in float32 inside, and multiplies by the weight before it rounds
where transformers rounds before it multiplies.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

__all__ = ["fuse_norms", "fused_norm"]


def fuse_norms(model: nn.Module) -> int:
    """Let the RMSNorms of a transformers model of a supported family be one operation on a GPU.

    Returns:
        How many norms were changed.
    """
    changed = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_forward, module)
            changed += 1
    return changed


def _forward(norm: Any, x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        out: Tensor = type(norm).forward(norm, x)
        return out
    return fused_norm(x, norm.weight, norm.variance_epsilon)


def fused_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension, in the dtype of ``x``."""
    # Autocast has it widen its input, which it does inside anyway.
    with torch.autocast(x.device.type, enabled=False):
        return rms_norm(x, (x.shape[-1],), weight_D.to(x.dtype), eps)
