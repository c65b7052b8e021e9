"""What training logs of its steps beside transformers' own: losses, speed and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Meter"]


class Meter:
    """Means since the last line of the log."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._num_tokens = 0
        self._started_s = time.monotonic()

    def add(self, means: Mapping[int, Tensor], inputs: Mapping[str, Tensor]) -> None:
        """Count one micro-batch in: its mean cross-entropy per exit, and what it was made of."""
        count = inputs["target_rows"].numel()
        self._num_tokens += inputs["input_ids"].numel()
        for exit_layer, mean in means.items():
            previous = self._sums.get(exit_layer, torch.zeros_like(mean))
            self._sums[exit_layer] = previous + mean * count
            self._counts[exit_layer] = self._counts.get(exit_layer, 0) + count

    def read(self) -> dict[str, float]:
        """``loss_exit_E``, ``tokens_per_s`` and ``memory_gb``, and start anew."""
        exits = sorted(self._sums)
        # One copy for all exits, and the only time that the host waits for them.
        sums = torch.stack([self._sums[e] for e in exits]).tolist() if exits else []
        values = {
            f"loss_exit_{e}": total / max(1, self._counts[e])
            for e, total in zip(exits, sums, strict=True)
        }
        values["tokens_per_s"] = self._num_tokens / max(1e-9, time.monotonic() - self._started_s)
        values["memory_gb"] = _peak_bytes() / 1e9
        self._reset()
        return values


def _peak_bytes() -> int:
    """Of the GPU where there is one in use, else of the process."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch has no type here
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
