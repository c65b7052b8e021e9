"""How much memory the KV cache takes, and what loading leaves behind."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sortserve.core.errors import ConfigError
from sortserve.model.attention import KVCache
from sortserve.model.decoder import Decoder
from sortserve.model.device_memory import MemoryUse, gib

__all__ = [
    "CacheShape",
    "available_memory_bytes",
    "cache_shape",
    "num_kv_pages",
    "return_freed_memory",
]

MEMORY_SHARE = 0.25
"""Share of the free memory that the KV cache takes unless told."""


@dataclass(frozen=True)
class CacheShape:
    """The KV cache in numbers."""

    num_pages: int
    block_size: int
    slab_size: int
    page_bytes: int

    @property
    def num_bytes(self) -> int:
        """Memory of all pages."""
        return self.num_pages * self.page_bytes


def cache_shape(
    decoder: Decoder,
    *,
    max_model_len: int,
    max_num_seqs: int,
    block_size: int,
    kv_cache_memory: int | None,
    use: MemoryUse | None = None,
    num_sharing: int = 1,
) -> CacheShape:
    """The cache that an engine gets.

    Args:
        decoder: on the device whose memory counts.
        max_model_len: most tokens of a sequence.
        max_num_seqs: no more sequences than so many can ever use the cache at once.
        block_size: tokens of a page.
        kv_cache_memory: bytes; None: what ``use`` leaves, or on a CPU a share of what is free.
        use: of the device's own memory, if it was measured.
        num_sharing: processes that take as much of the same memory.

    Raises:
        ConfigError: it does not fit the machine, or is too small for one sequence of full length.
    """
    page_bytes = KVCache.page_bytes(
        decoder.local_config, decoder.slabs.size, block_size, decoder.dtype
    )
    pages_per_seq = -(-max_model_len // block_size) * decoder.num_slabs
    if kv_cache_memory is not None:
        memory_bytes = int(kv_cache_memory)
    elif use is not None:
        memory_bytes = use.kv_cache
        _check_room(use, pages_per_seq * page_bytes)
    else:
        memory_bytes = int(MEMORY_SHARE * available_memory_bytes(decoder.device) / num_sharing)
    num_pages = num_kv_pages(
        memory_bytes=memory_bytes,
        page_bytes=page_bytes,
        pages_per_seq=pages_per_seq,
        max_num_seqs=max_num_seqs,
    )
    cache = CacheShape(num_pages, block_size, decoder.slabs.size, page_bytes)
    limit = total_memory_bytes(decoder.device)
    if cache.num_bytes > limit:
        raise ConfigError(
            f"--kv-cache-memory={kv_cache_memory}: the KV cache would take "
            f"{cache.num_bytes / 2**20:.0f} MiB, but there are only {limit / 2**20:.0f} MiB here.",
            param="kv-cache-memory",
        )
    return cache


def _check_room(use: MemoryUse, bytes_per_seq: int) -> None:
    if use.kv_cache < bytes_per_seq:
        raise ConfigError(
            f"the KV cache does not fit: {use}, which leaves {gib(max(0, use.kv_cache))}, and one "
            f"sequence of full length needs {gib(bytes_per_seq)}. Give a smaller --max-model-len "
            "or --max-num-batched-tokens, a larger --gpu-memory-utilization, or --quantize.",
            param="gpu-memory-utilization",
        )


def num_kv_pages(
    *, memory_bytes: int, page_bytes: int, pages_per_seq: int, max_num_seqs: int
) -> int:
    """Pages that fit the memory, and no more than full sequences at full depth could ever use.

    Raises:
        ConfigError: not even one such sequence fits.
    """
    num_pages = min(memory_bytes // page_bytes, pages_per_seq * max_num_seqs)
    if num_pages < pages_per_seq:
        need_mib = -(-pages_per_seq * page_bytes // 2**20)
        raise ConfigError(
            f"the KV cache has {memory_bytes / 2**20:.1f} MiB, but one sequence of full length "
            f"needs {need_mib} MiB: give --kv-cache-memory={need_mib}MiB or more, or a smaller "
            "--max-model-len.",
            param="kv-cache-memory",
        )
    return num_pages


def total_memory_bytes(device: torch.device) -> int:
    """Memory that there is at most: free on the GPU, or of the machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (limit_text := limit.read_text().strip()) != "max":
        total = min(total, int(limit_text))
    return total


def available_memory_bytes(device: torch.device) -> int:
    """Memory that may be taken now: of the GPU, or of the machine within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _meminfo_available_bytes(Path("/proc/meminfo"))
    free = [total // 2 if available is None else available]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (limit_text := limit.read_text().strip()) != "max":
        free.append(max(0, int(limit_text) - int(used.read_text())))
    return min(free)


def _meminfo_available_bytes(path: Path) -> int | None:
    """``MemAvailable`` of Linux; None on systems without it."""
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def return_freed_memory() -> None:
    """Give the system back what this process has freed but its allocator still holds.

    Reading, merging and packing a model frees as much again as the model takes, in pieces too small
    to go back by themselves. Does nothing where the C library is not glibc.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
