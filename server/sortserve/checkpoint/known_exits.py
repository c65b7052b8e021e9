"""At which layers a checkpoint was trained to be left, and which of them are served."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass

from sortserve.checkpoint.layout import CheckpointLayout
from sortserve.checkpoint.sorted_json import SORTED_JSON, check_exits
from sortserve.core.errors import ConfigError
from sortserve.model.config import ModelConfig

__all__ = ["KnownExits", "choose_exits", "known_exits"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KnownExits:
    """What is known of a checkpoint's exits."""

    served: tuple[int, ...]
    """Unless told otherwise: ascending, the last the full depth."""
    trained: Container[int]
    reason: str
    """Why others are taken for untrained."""


def known_exits(layout: CheckpointLayout, config: ModelConfig) -> KnownExits:
    """By ``sorted.json``, by a preset, or by the architecture."""
    info, preset, num_layers = layout.sorted_info, layout.preset, config.num_layers
    if info is not None:
        reason = f"{SORTED_JSON} names {list(info.exits)}"
        return KnownExits(served=info.exits, trained=info.exits, reason=reason)
    if preset is not None and preset.num_layers != num_layers:
        logger.warning(
            "%s is known here as a model of %d layers, but this one has %d: nothing is known of it",
            layout.name,
            preset.num_layers,
            num_layers,
        )
    elif preset is not None:
        return KnownExits(
            served=preset.exits,
            trained=range(preset.trained_from, num_layers + 1),
            reason=f"it was trained to be left from layer {preset.trained_from} on",
        )
    loops = tuple(config.num_stack_layers * (i + 1) for i in range(config.num_loops))
    reason = f"no {SORTED_JSON}"
    if len(loops) > 1:
        reason = f"it was trained to be left at the ends of its loops, {list(loops)}"
    return KnownExits(served=loops, trained=loops, reason=reason)


def choose_exits(
    override: Sequence[int] | None, config: ModelConfig, layout: CheckpointLayout
) -> tuple[int, ...]:
    """The exits to serve, ascending, the last the full depth.

    Raises:
        ConfigError: ``override``, what the user named, does not ascend or is not of the model.
    """
    known = known_exits(layout, config)
    if override is None:
        return known.served
    chosen = tuple(override)
    try:
        check_exits(chosen, config.num_layers)
    except ValueError as error:
        raise ConfigError(f"{error}.", param="exits") from error
    if not chosen or chosen[-1] != config.num_layers:
        chosen = (*chosen, config.num_layers)
    untrained = [exit_layer for exit_layer in chosen if exit_layer not in known.trained]
    if untrained:
        logger.warning(
            "Exits %s are untrained: %s. Their output may be of no use.", untrained, known.reason
        )
    return chosen
