"""Implementations of the model's operations, one folder each, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    "REFERENCE",
    "backend_names",
    "check_backend_name",
    "choose_backend",
    "usable_backends",
]

AUTO = "auto"
REFERENCE = "reference"
"""What works everywhere, and what the others are checked against."""
BACKENDS: dict[str, Callable[[Target], Backend | Unusable]] = {
    REFERENCE: ReferenceBackend,
    "triton": make_triton_backend,
    "flashinfer": make_flashinfer_backend,
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
    return next(usable_backends(Target(config, dtype, device), name))


def usable_backends(target: Target, name: str = AUTO, flag: str = "backend") -> Iterator[Backend]:
    """Those that work for a target on this machine, made one by one, in the order of choice: the
    one of that name ("auto": the last of the table), then those before it in the table. The last
    is the reference.

    Args:
        target: what is to be computed and where.
        name: one of ``backend_names()``.
        flag: that gives it.

    Raises:
        ConfigError: a backend asked for by name does not exist or does not work here.
    """
    has_begun, reason = name == AUTO, "there is none of that name"
    for offered, make in reversed(BACKENDS.items()):
        if offered != name and (not has_begun or offered in ONLY_BY_NAME):
            continue
        answer = make(target)
        if not isinstance(answer, Unusable):
            yield answer
        elif not has_begun:
            reason = answer.reason
            break
        has_begun = True
    if not has_begun:
        advice = f"Use {AUTO}" if flag == "backend" else "Leave it out"
        names = backend_names() if flag == "backend" else BACKENDS
        raise ConfigError(
            f"--{flag}={name} cannot be used for {str(target.dtype).removeprefix('torch.')} on "
            f"{target.device.type} on this machine: {reason}. {advice} "
            f"(there are: {', '.join(names)}).",
            param=flag,
        )


def check_backend_name(name: str, flag: str = "backend") -> None:
    """Refuse what is the name of no backend, before anything is loaded.

    Args:
        name: as given.
        flag: that gives it; only ``backend`` may be "auto".

    Raises:
        ConfigError: it is none.
    """
    names = backend_names() if flag == "backend" else list(BACKENDS)
    if name not in names:
        raise ConfigError(f"--{flag}={name!r} is not one of {', '.join(names)}.", param=flag)


def backend_names() -> list[str]:
    """What ``--backend`` may be."""
    return [AUTO, *BACKENDS]
