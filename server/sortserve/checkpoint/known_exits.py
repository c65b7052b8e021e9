"""At which layers a checkpoint was trained to be left, and which of them are served."""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass

from sortserve.checkpoint.layout import CheckpointLayout
from sortserve.checkpoint.sorted_json import SORTED_JSON
from sortserve.model.config import ModelConfig

__all__ = ["KnownExits", "known_exits"]

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
