"""``exit_modules.safetensors``: the weights of what stands between trunk and head at each exit.

The tensors of exit E are named ``exits.{E}.NAME``; names and shapes are those of its kind
(``ExitModule.shapes``), listed in checkpoints/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sortserve.checkpoint.loader import check_tensors
from sortserve.checkpoint.tensors import SafetensorsReader
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS
from sortserve.model.weights import ExitModuleWeights

__all__ = ["EXIT_MODULES", "load_exit_modules"]

EXIT_MODULES = "exit_modules.safetensors"


def load_exit_modules(
    folder: Path,
    kinds: Mapping[int, str],
    exits: Sequence[int],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[int, ExitModuleWeights]:
    """The modules of the served ``exits``; those without tensors have no entry.

    Args:
        folder: where ``exit_modules.safetensors`` lies.
        kinds: all modules ``sorted.json`` names; the file must hold just these.
        exits: the exits to be served, a part of the checkpoint's or others.
        config: gives the shapes.
        dtype: of the result.
        device: of the result.

    Raises:
        CheckpointError: the file is missing or truncated, or a tensor is missing, of another
            shape, or of no module that ``sorted.json`` names.
    """
    shapes = {layer: EXIT_MODULE_KINDS[name].shapes(config) for layer, name in kinds.items()}
    path = folder / EXIT_MODULES
    if not any(shapes.values()) and not path.exists():
        return {}
    expected = {
        f"exits.{layer}.{name}": shape for layer in shapes for name, shape in shapes[layer].items()
    }
    with SafetensorsReader([path], str(folder)) as reader:
        extra = sorted(set(reader.shapes) - set(expected))
        if extra:
            raise CheckpointError(
                f"{path}: tensor {extra[0]} belongs to no exit module that sorted.json names."
            )
        check_tensors(reader, expected)

        def read(layer: int, name: str) -> Tensor:
            # A copy, so that no weight stays a view of the mapped file.
            tensor = reader.read(f"exits.{layer}.{name}")
            return tensor.to(device=device, dtype=dtype, copy=True)

        return {
            layer: ExitModuleWeights(
                kind=EXIT_MODULE_KINDS[kinds[layer]],
                tensors={name: read(layer, name) for name in shapes[layer]},
            )
            for layer in exits
            if shapes.get(layer)
        }
