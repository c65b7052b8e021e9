"""What ``--dtype auto`` means to the trainer, which computes with PyTorch's operations."""

from __future__ import annotations

import torch

from sortserve.checkpoint.devices import resolve_dtype
from sortserve.model.backends.cpu.isa import runnable_isas

__all__ = ["resolve_trainer_dtype"]

_FAST_IN_BF16 = {"amx", "avx512_bf16"}


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
    is_fast = any(isa.name in _FAST_IN_BF16 for isa in runnable_isas())
    return torch.bfloat16 if is_fast else torch.float32
