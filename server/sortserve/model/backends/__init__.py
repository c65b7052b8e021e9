"""Implementations of the model's operations, one folder each, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sortserve.core.errors import ConfigError
from sortserve.model.backend import Backend, Target
from sortserve.model.backends.cpu.backend import make_cpu_backend
from sortserve.model.backends.reference.backend import ReferenceBackend
from sortserve.model.config import ModelConfig

__all__ = ["AUTO", "BACKENDS", "backend_names", "check_backend_name", "choose_backend"]

AUTO = "auto"
BACKENDS: dict[str, Callable[[Target], Backend | None]] = {
    "reference": ReferenceBackend,
    "cpu": make_cpu_backend,
}
"""All there are, by name. Each answers None for a target that it cannot compute on this machine;
under "auto" the last one that can is taken."""


def choose_backend(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, name: str = AUTO
) -> Backend:
    """The backend of that name; "auto": what is fastest for this model on this machine.

    Args:
        config: sizes of the model.
        dtype: in which it computes.
        device: of the weights.
        name: one of ``backend_names()``.

    Raises:
        ConfigError: a backend asked for by name does not exist or does not work here.
    """
    target = Target(config, dtype, device)
    for offered, make in reversed(BACKENDS.items()):
        if name in (AUTO, offered):
            backend = make(target)
            if backend is not None:
                return backend
    raise ConfigError(
        f"--backend={name} cannot be used for {str(dtype).removeprefix('torch.')} on "
        f"{device.type} on this machine: use {AUTO} (there are: {', '.join(backend_names())}).",
        param="backend",
    )


def check_backend_name(name: str) -> None:
    """Refuse what is the name of no backend, before anything is loaded.

    Raises:
        ConfigError: it is none.
    """
    if name not in backend_names():
        raise ConfigError(
            f"--backend={name!r} is not one of {', '.join(backend_names())}.", param="backend"
        )


def backend_names() -> list[str]:
    """What ``--backend`` may be."""
    return [AUTO, *BACKENDS]
