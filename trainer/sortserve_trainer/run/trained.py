"""What is trained of a model, by name: the weights of a state to resume from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sortserve_trainer.model.sorted_model import SortedModel

__all__ = ["load_trained_tensors", "trained_tensors"]


def trained_tensors(
    model: SortedModel, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The parameters that are trained, by name; from ``state_dict`` where they are sharded."""
    return {
        name: (tensor.data if state_dict is None else state_dict[name]).contiguous()
        for name, tensor in _state(model).items()
    }


def load_trained_tensors(model: SortedModel, tensors: Mapping[str, Tensor]) -> None:
    """The reverse; every trained parameter must be there, and nothing else."""
    state = _state(model)
    assert state.keys() == tensors.keys(), "a state of another run"
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


def _state(model: SortedModel) -> dict[str, Tensor]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    scales = {f"exit_modules.{n}": b for n, b in model.exit_modules.named_buffers()}
    return {**trained, **scales}
