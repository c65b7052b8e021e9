"""Which backend an engine computes with: the first in the order of choice that passes its check."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from sortserve.core.errors import ConfigError
from sortserve.engine.backend_check import largest_difference
from sortserve.model.backend import Backend, Target
from sortserve.model.backends import AUTO, REFERENCE, choose_backend, usable_backends
from sortserve.model.config import ModelConfig
from sortserve.model.weights import ModelWeights
from sortserve.telemetry.logs import fields

__all__ = ["BackendChoice", "choose_checked_backend"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendChoice:
    """What became of the choice."""

    backend: Backend
    failed: tuple[str, ...] = ()
    """Names of those that were to be used before it, and failed their check."""


def choose_checked_backend(
    config: ModelConfig,
    weights: ModelWeights,
    *,
    name: str = AUTO,
    required: str | None = None,
    block_size: int,
) -> BackendChoice:
    """The backend of that name, or what is fastest here, once it has shown that it is right.

    One that is further from the reference than rounding explains, or raises, is passed over, with a
    warning that says how far and where.

    Args:
        config: of the model.
        weights: of the model, all there.
        name: one of ``backend_names()``.
        required: the only one to be used.
        block_size: tokens of a page.

    Raises:
        ConfigError: the one asked for does not work here; or the required one fails its check.
    """
    target = Target(config, weights.dtype, weights.device)
    failed: list[str] = []
    flag = "backend" if required is None else "require-backend"
    for backend in usable_backends(target, required or name, flag):
        fault = _fault_of(backend, config, weights, block_size)
        if fault is None:
            return BackendChoice(backend, tuple(failed))
        if required is not None:
            raise ConfigError(
                f"--require-backend={required}: it fails its check on this machine: {fault}.",
                param="require-backend",
            )
        logger.warning(
            "the backend %s is not used: %s",
            backend.name,
            fault,
            extra=fields(backend=backend.name),
        )
        failed.append(backend.name)
    raise AssertionError("the reference always works")


def _fault_of(
    backend: Backend, config: ModelConfig, weights: ModelWeights, block_size: int
) -> str | None:
    """Why a backend must not be used; None: it may be."""
    if backend.name == REFERENCE:
        return None
    started_s = time.monotonic()
    reference = choose_backend(config, weights.dtype, weights.device, REFERENCE)
    try:
        found = largest_difference(backend, reference, config, weights, block_size=block_size)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.debug("the check of the backend %s raised", backend.name, exc_info=error)
        first_line = (str(error).splitlines() or [""])[0]
        return f"it raises {type(error).__name__}: {first_line}"
    if not found.is_tolerable:
        return f"its largest difference from the reference is {found}"
    logger.info(
        "the backend computes what the reference does",
        extra=fields(
            backend=backend.name,
            largest_difference=f"{found.share:.2g}",
            tolerance=found.tolerance,
            seconds=round(time.monotonic() - started_s, 2),
        ),
    )
    return None
