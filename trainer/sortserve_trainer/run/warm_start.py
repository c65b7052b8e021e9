"""What exit modules learn before the first step, from a few thousand tokens.

Modules that ask for it (``ExitModule.reads_states``) are shown the second moments of the states at
their exit, and of the normed states at full depth beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sortserve_trainer.model.moments import Moments
from sortserve_trainer.model.sorted_model import SortedModel

__all__ = ["warm_start"]


@torch.no_grad()
def warm_start(
    model: SortedModel, new: Sequence[int], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Let every module that reads states see some.

    Args:
        model: the trunk whose states are read.
        new: exits whose module was made now; the others have been trained.
        batches: packed rows as ``collate`` makes them; their first tokens are left out, whose
            states are outliers of another scale.
    """
    modules = {e: module for e, module in model.exit_modules.by_exit.items() if module.reads_states}
    if not modules:
        return
    full = model.exits[-1]
    device = model.base.model.norm.weight.device
    moments = {e: Moments(model.config.hidden_size, device) for e in modules}
    for batch in batches:
        keep = batch["position_ids"][0].to(device) > 0
        states = model.trunk_states(
            batch["input_ids"].to(device),
            batch["position_ids"].to(device),
            batch["lengths"],
            [*modules, full],
        )
        y_TD = states[full][keep].double()
        y_TD = y_TD * y_TD.square().mean(-1, keepdim=True).rsqrt()
        for exit_layer in modules:
            moments[exit_layer].add(states[exit_layer][keep].double(), y_TD)
    for exit_layer, module in modules.items():
        module.warm_start(moments[exit_layer], is_new=exit_layer in new)
