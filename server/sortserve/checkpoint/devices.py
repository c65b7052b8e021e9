"""What ``--device`` and ``--dtype`` mean on this machine."""

from __future__ import annotations

from typing import Any

import torch

from sortserve.core.errors import ConfigError
from sortserve.model.backends.kernels import cpu_isa

__all__ = ["DEVICES", "DTYPES", "resolve_device", "resolve_dtype"]

_TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
DTYPES = ("auto", *_TORCH_DTYPES)
DEVICES = ("auto", "cpu", "cuda")


def resolve_device(device: str, *, rank: int = 0, num_ranks: int = 1) -> torch.device:
    """The device that one of DEVICES means here, for one of several ranks.

    On a CPU all ranks have the same; CUDA devices are one each, ``cuda:RANK``.

    Raises:
        ConfigError: it is none of them, or there are too few CUDA devices.
    """
    if device not in DEVICES:
        raise ConfigError(f"device={device!r} is not one of {', '.join(DEVICES)}.", param="device")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device='cuda', but PyTorch finds no CUDA device here: "
            "use device='cpu', or install a CUDA build of torch.",
            param="device",
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" or num_ranks == 1:
        return torch.device(device)
    if num_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"--tensor-parallel-size={num_ranks}: each rank needs a CUDA device of its own, and "
            f"PyTorch finds {torch.cuda.device_count()} here.",
            param="tensor-parallel-size",
        )
    return torch.device("cuda", rank)


def resolve_dtype(dtype: str, device: torch.device, hf_config: Any | None) -> torch.dtype:
    """The dtype to compute in; "auto" on a CPU: bf16 wherever our kernels run, which are for it.

    ``hf_config`` is None for GGUF, whose stored dtype is no dtype to compute in.
    """
    if dtype != "auto":
        return _TORCH_DTYPES[dtype]
    if device.type == "cuda":
        stored = getattr(hf_config, "dtype", None)
        return next((d for d in _TORCH_DTYPES.values() if d == stored), torch.bfloat16)
    return torch.float32 if cpu_isa() is None else torch.bfloat16
