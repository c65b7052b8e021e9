"""The only two ways between host and device that a step takes: in at its start, out at its end.

Between the two nothing may wait for the device: each wait would keep it idle for as long as the
host needs to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Download", "upload", "upload_in_one_copy"]

_ALIGNMENT = 16
"""Bytes: kernels read vectors of so many."""

Array = NDArray[Any]


def upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The arrays as tensors of the same shapes and types on the device.

    The host does not wait for it. On the CPU they share the arrays' memory where they can.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return upload_in_one_copy(arrays, device)


def upload_in_one_copy(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The same, side by side in one buffer: a copy costs the same for a byte as for many.

    The buffer is page-locked where the device is a GPU. PyTorch keeps such memory and gives it out
    again only when the copies from it are done, so none is made anew in a steady state.
    """
    bounds = []
    size = 0
    for array in arrays:
        start = -(-size // _ALIGNMENT) * _ALIGNMENT
        size = start + array.nbytes
        bounds.append((start, size))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host_bytes = host.numpy()
    for array, (start, end) in zip(arrays, bounds, strict=True):
        host_bytes[start:end].view(array.dtype)[:] = array.reshape(-1)
    packed = torch.empty_like(host, device=device, pin_memory=False)
    packed.copy_(host, non_blocking=True)
    return [
        packed[start:end].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, (start, end) in zip(arrays, bounds, strict=True)
    ]


class Download:
    """What a tensor holds now, on its way to the host while the device goes on.

    Args:
        tensor: contiguous.
        is_reused: whether it will be written again. If not, the result may be the tensor itself.
    """

    def __init__(self, tensor: Tensor, *, is_reused: bool = False) -> None:
        self._host = tensor.clone() if is_reused and tensor.device.type == "cpu" else tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def array(self) -> Array:
        """It: the one place where a step waits for the device, and for no later step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        result: Array = self._host.cpu().numpy()
        return result
