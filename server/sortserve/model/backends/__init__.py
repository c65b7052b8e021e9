"""Implementations of the model's operations, one folder each, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sortserve.core.errors import ConfigError
from sortserve.model.backend import Backend, Target, Unusable
from sortserve.model.backends.cpu.backend import make_cpu_backend
from sortserve.model.backends.flashinfer.backend import make_flashinfer_backend
from sortserve.model.backends.reference.backend import ReferenceBackend
from sortserve.model.backends.triton.choice import make_triton_backend
from sortserve.model.config import ModelConfig

__all__ = [
    "AUTO",
    "BACKENDS",
    "ONLY_BY_NAME",
    "backend_names",
    "check_backend_name",
    "choose_backend",
]

AUTO = "auto"
BACKENDS: dict[str, Callable[[Target], Backend | Unusable]] = {
    "reference": ReferenceBackend,
    "flashinfer": make_flashinfer_backend,
    "triton": make_triton_backend,
    "cpu": make_cpu_backend,
}
"""All there are, by name. Under "auto" the last one that can compute the target is taken."""
ONLY_BY_NAME = frozenset({"flashinfer"})
"""Those that "auto" passes over."""


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
    reason = "there is none of that name"
    for offered, make in reversed(BACKENDS.items()):
        if name == offered or (name == AUTO and offered not in ONLY_BY_NAME):
            answer = make(target)
            if not isinstance(answer, Unusable):
                return answer
            reason = answer.reason
    raise ConfigError(
        f"--backend={name} cannot be used for {str(dtype).removeprefix('torch.')} on "
        f"{device.type} on this machine: {reason}. Use {AUTO} "
        f"(there are: {', '.join(backend_names())}).",
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
