"""What exit modules learn before the first step, from some thousand tokens.

Modules that ask for it (``ExitModule.reads_states``) are shown the states at their exit and those
at full depth, and the weights of the last layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sortserve_trainer.model.exit_module import SeenStates
from sortserve_trainer.model.last_layer import last_layer_tensors
from sortserve_trainer.model.sorted_model import SortedModel

__all__ = ["seen_states", "warm_start"]


@torch.no_grad()
def warm_start(
    model: SortedModel, new: Sequence[int], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Let every module that reads states see some.

    Args:
        model: the trunk whose states are read.
        new: exits whose module was made now; the others have been trained.
        batches: packed rows as ``collate`` makes them.
    """
    modules = {e: module for e, module in model.exit_modules.by_exit.items() if module.reads_states}
    if not modules:
        return
    seen = seen_states(model, list(modules), batches)
    last_layer = last_layer_tensors(model.base.model.layers[-1])
    for exit_layer, module in modules.items():
        module.warm_start(seen[exit_layer], last_layer, is_new=exit_layer in new)


@torch.no_grad()
def seen_states(
    model: SortedModel, exits: Sequence[int], batches: Iterable[Mapping[str, Tensor]]
) -> dict[int, list[SeenStates]]:
    """What the modules of some exits are shown, by exit: one for each of ``batches``."""
    full = model.exits[-1]
    device = model.base.model.norm.weight.device
    seen: dict[int, list[SeenStates]] = {e: [] for e in exits}
    for batch in batches:
        position_ids = batch["position_ids"].to(device)
        states = model.trunk_states(
            batch["input_ids"].to(device), position_ids, batch["lengths"], [*exits, full - 1, full]
        )
        for exit_layer in exits:
            own = SeenStates(
                row=states.row,
                x_TD=states[exit_layer],
                before_last_TD=states[full - 1],
                full_TD=states[full],
                is_typical_T=position_ids[0] > 0,
            )
            seen[exit_layer].append(own)
    return seen
