"""Implementations of the model's operations, one folder each, and the choice among them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from sortserve.core.errors import ConfigError
from sortserve.model.backend import Backend, Provider, Target
from sortserve.model.backends.cpu.backend import CPU
from sortserve.model.backends.reference.backend import REFERENCE
from sortserve.model.config import ModelConfig

__all__ = ["BACKENDS", "attention_names", "choose_backend", "linear_names"]

_Part = TypeVar("_Part")

BACKENDS: list[Provider] = [REFERENCE, CPU]
"""All there are; under "auto", the last one that works is taken."""


def choose_backend(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str = "auto",
    linear: str = "auto",
) -> Backend:
    """The backend of these names; "auto": what is fastest for this model on this machine.

    Args:
        config: sizes of the model.
        dtype: of the weights.
        device: of the weights.
        attention: one of ``attention_names()``; for norms and whole layers, too.
        linear: one of ``linear_names()``.

    Raises:
        ConfigError: a backend asked for by name does not exist or does not work here.
    """
    target = Target(config, dtype, device)
    offers = [provider.attention for provider in BACKENDS]
    for_attention = _choose("attention_backend", attention, offers, target)
    linear_offers = [provider.linear for provider in BACKENDS]
    for_linear = _choose("linear_backend", linear, linear_offers, target, for_attention.ops)
    return Backend(for_attention, for_linear)


def attention_names() -> list[str]:
    """What ``--attention-backend`` may be."""
    return _names(provider.attention for provider in BACKENDS)


def linear_names() -> list[str]:
    """What ``--linear-backend`` may be."""
    return _names(provider.linear for provider in BACKENDS)


def _choose(
    param: str,
    name: str,
    offers: Sequence[Mapping[str, Callable[..., _Part | None]]],
    target: Target,
    *arguments: object,
) -> _Part:
    """The last part of that name that works here."""
    for offer in reversed(offers):
        part: _Part | None = offer[name](target, *arguments) if name in offer else None
        if part is not None:
            return part
    raise ConfigError(
        f"{param} {name!r} cannot be used for {target.dtype} on {target.device.type} on this "
        f"machine; use 'auto' (backends: {', '.join(_names(offers))})",
        param=param,
    )


def _names(offers: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(offers)))
