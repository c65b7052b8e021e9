"""The mean of the trained weights over the last steps (stochastic weight averaging).

The mean over the tail of a run whose rate goes down is less noisy than its last step, and costs a
copy of what is trained (arXiv 1803.05407).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

__all__ = ["TailAverage"]

AVERAGE = "average.safetensors"


class TailAverage(TrainerCallback):  # type: ignore[misc] # transformers has no types here
    """Takes part in a mean after every step from some step on.

    Args:
        model: whose parameters that require a gradient are averaged, in float32.
        share: of the steps, at the end; 0 averages nothing.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self._model, self._share = model, share
        self._mean: dict[str, Tensor] = {}
        self.count = 0
        """Steps in the mean."""

    @property
    def misses_all(self) -> bool:
        """Whether there is to be a mean, and no step is in it."""
        return self._share > 0 and not self.count

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count a step in, if it is one of the last."""
        if state.global_step > state.max_steps - round(self._share * state.max_steps):
            self.add()

    @torch.no_grad()
    def add(self) -> None:
        """Count the present weights in."""
        self.count += 1
        for name, parameter in self._parameters().items():
            value = parameter.detach().float()
            if name not in self._mean:
                self._mean[name] = value.clone()
            else:
                self._mean[name] += (value - self._mean[name]) / self.count

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The mean in place of the weights, where there is one."""
        if not self.count:  # a copy of all weights is not for nothing
            yield
            return
        kept = {name: p.detach().clone() for name, p in self._parameters().items()}
        try:
            self.take()
            yield
        finally:
            self._copy(kept)

    def take(self) -> None:
        """Put the mean in place of the weights, where there is one, for good."""
        if self.count:
            self._copy(self._mean)

    def save(self, folder: Path) -> None:
        """Beside the weights of a state to resume from."""
        if self.count:
            save_file(self._mean, folder / AVERAGE, metadata={"count": str(self.count)})

    def load(self, folder: Path) -> None:
        """What ``save`` wrote; a state of before the tail has nothing."""
        self._mean, self.count = {}, 0
        path = folder / AVERAGE
        if path.is_file():
            device = next(iter(self._parameters().values())).device
            self._mean = {name: t.to(device) for name, t in load_file(path).items()}
            with safe_open(path, framework="pt") as file:
                self.count = int(file.metadata()["count"])

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters().items():
            parameter.copy_(tensors[name])
