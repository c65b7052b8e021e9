"""What training logs of its steps beside transformers' own: losses, speed and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping

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

    def read(self, total: Callable[[Tensor], Tensor] = lambda own: own) -> dict[str, float]:
        """``loss_exit_E``, ``tokens_per_s`` and ``memory_gb``, and start anew.

        Args:
            total: makes of the float64 numbers of this process the sums over all that share the
                run; all of them read at once.
        """
        exits = sorted(self._sums)
        sums = [self._sums[e].double() for e in exits]
        own = [self._num_tokens, *(self._counts[e] for e in exits)]
        device = sums[0].device if sums else None
        numbers = [*sums, *torch.tensor(own, dtype=torch.float64, device=device)]
        # One copy for all exits, and the only time that the host waits for them.
        found = total(torch.stack(numbers)).tolist()
        losses, (num_tokens, *counts) = found[: len(exits)], found[len(exits) :]
        values = {
            f"loss_exit_{e}": loss / max(1.0, count)
            for e, loss, count in zip(exits, losses, counts, strict=True)
        }
        values["tokens_per_s"] = num_tokens / max(1e-9, time.monotonic() - self._started_s)
        values["memory_gb"] = _peak_bytes() / 1e9
        self._reset()
        return values


def _peak_bytes() -> int:
    """Of the GPU where there is one in use, else of the process."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch has no type here
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
