"""Memory of a GPU: what there is, what a step takes, and one line for a start that it is short for.

``kv_cache_bytes`` is arithmetic on plain values. ``DeviceMemory`` is what it needs to know of a
device; there is one for CUDA, and none for a CPU, whose memory is the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from sortserve.core.errors import ConfigError

__all__ = ["DeviceMemory", "MemoryUse", "device_memory", "gib", "refusing_too_much"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What is known of a GPU's memory before its KV cache is made, in bytes."""

    total: int
    """Of the device."""
    free: int
    """With the weights loaded, whoever uses the rest."""
    weights: int
    """Of the model."""
    largest_step: int
    """What a step takes beside weights and KV cache, at most."""
    utilization: float
    """Share of the total that may be in use in the end."""

    @property
    def reserved(self) -> int:
        """What must stay free."""
        return self.total - int(self.total * self.utilization)

    @property
    def kv_cache(self) -> int:
        """What is left for the KV cache; none is left if it is not above 0."""
        return self.free - self.reserved - self.largest_step

    def __str__(self) -> str:
        return (
            f"of {gib(self.total)} GiB on the GPU {gib(self.free)} are free beside the weights "
            f"({gib(self.weights)}), the largest step takes {gib(self.largest_step)} and "
            f"--gpu-memory-utilization={self.utilization:g} keeps {gib(self.reserved)} free"
        )


class DeviceMemory(Protocol):
    """A device with memory of its own."""

    def total_bytes(self) -> int:
        """All there is."""
        ...

    def free_bytes(self) -> int:
        """What nobody uses; what this process only holds in reserve is given back first."""
        ...

    def peak_of(self, run: Callable[[], object]) -> int:
        """The most bytes that ``run`` takes at once beyond those in use before it."""
        ...


class CudaMemory:
    """A CUDA device's, as its driver and PyTorch's allocator tell. See ``DeviceMemory``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total_bytes(self) -> int:
        """See DeviceMemory."""
        return int(torch.cuda.mem_get_info(self._device)[1])

    def free_bytes(self) -> int:
        """See DeviceMemory."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])

    def peak_of(self, run: Callable[[], object]) -> int:
        """See DeviceMemory; with what the allocator loses between its blocks."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_reserved(self._device)) - before


def device_memory(device: torch.device) -> DeviceMemory | None:
    """That of a device; None: it uses the machine's."""
    return CudaMemory(device) if device.type == "cuda" else None


@contextmanager
def refusing_too_much(
    memory: DeviceMemory | None, what: str, num_bytes: int | None, advice: str
) -> Iterator[None]:
    """Turn the allocator's end of memory into a line for whoever starts the server.

    Args:
        memory: of the device that is used inside ``with``.
        what: is made there: ``the weights``.
        num_bytes: that it takes, if that is known.
        advice: what to change.

    Raises:
        ConfigError: the device's memory has run out inside ``with``.
    """
    total, free = (0, 0) if memory is None else (memory.total_bytes(), memory.free_bytes())
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = "" if num_bytes is None else f" ({gib(num_bytes)} GiB)"
        raise ConfigError(
            f"{what}{size} did not fit the GPU, of whose {gib(total)} GiB {gib(free)} were free. "
            f"{advice}",
            param="device",
        ) from error


def gib(num_bytes: int) -> str:
    """A size in GiB, with as many digits as tell small ones apart."""
    size = num_bytes / GIB
    return f"{size:.1f}" if abs(size) >= 0.1 or size == 0 else f"{size:.3f}"
