"""What ``--dtype auto`` means to the trainer, which computes with PyTorch's operations."""

from __future__ import annotations

import torch

from sortserve.checkpoint.devices import resolve_dtype
from sortserve.model.backends.kernels import has_bf16_products

__all__ = ["resolve_trainer_dtype"]


def resolve_trainer_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    auto on a CPU: bfloat16 where the processor has products of it. Elsewhere PyTorch imitates
    them, and takes many times as long as in float32; a server has kernels of its own, and serves
    bfloat16 there all the same.

    Args:
        dtype: one of ``sortserve.checkpoint.load.DTYPES``.
        device: where.
    """
    if dtype != "auto" or device.type != "cpu":
        return resolve_dtype(dtype, device, None)
    return torch.bfloat16 if has_bf16_products() else torch.float32
