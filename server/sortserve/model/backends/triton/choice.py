"""Whether the Triton kernels can compute a target. Loads Triton only if they can."""

from __future__ import annotations

import importlib.util
import os

import torch

from sortserve.model.backend import Backend, Target, Unusable
from sortserve.model.backends.cpu.build import prebuilt_dir
from sortserve.model.backends.triton.driver_module import use_prebuilt_driver_module
from sortserve.model.backends.triton.tiles import INTERPRETED, Tiles, tiles_for

__all__ = ["INTERPRET_VARIABLE", "is_triton_installed", "make_triton_backend"]

INTERPRET_VARIABLE = "TRITON_INTERPRET"
"""Triton reads it when a kernel is defined: 1 runs kernels in an interpreter, on any device."""

_MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_triton_backend(target: Target) -> Backend | Unusable:
    """The kernels, on a CUDA device, or on a CPU in the interpreter."""
    why_not = _why_not(target)
    if why_not is not None:
        return Unusable(why_not)
    if target.device.type == "cuda":
        use_prebuilt_driver_module(prebuilt_dir())
    from sortserve.model.backends.triton.backend import TritonBackend

    tiles, detail = _tiles_on(target)
    return TritonBackend(target, tiles, detail)


def is_triton_installed() -> bool:
    """Whether there is a package of that name; it is not loaded."""
    return importlib.util.find_spec("triton") is not None


def _why_not(target: Target) -> str | None:
    device, head_dim = target.device.type, target.config.head_dim
    interpreted = os.environ.get(INTERPRET_VARIABLE) == "1"
    if device != "cuda" and not (device == "cpu" and interpreted):
        return (
            "its kernels are for CUDA devices; for tests, "
            f"{INTERPRET_VARIABLE}=1 interprets them on a CPU"
        )
    if not is_triton_installed():
        return "Triton is not installed: pip install 'sortserve[triton]'"
    if target.dtype not in _DTYPES:
        return f"its dtypes are {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
    if interpreted and target.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if head_dim > _MAX_HEAD_DIM:
        return f"head_dim={head_dim} is above {_MAX_HEAD_DIM}"
    return None


def _tiles_on(target: Target) -> tuple[Tiles, str]:
    """How to cut the work, and what the device is called."""
    if target.device.type == "cpu":
        return INTERPRETED, "interpreted"
    properties = torch.cuda.get_device_properties(target.device)
    tiles = tiles_for(
        target.config.head_dim, target.dtype.itemsize, properties.multi_processor_count
    )
    return tiles, f"sm_{properties.major}{properties.minor}"
