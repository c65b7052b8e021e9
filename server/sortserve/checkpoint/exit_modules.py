"""``exit_modules.safetensors``: what stands between the trunk and the shared head at an exit.

    exits.{E}.norm.weight        [D]     norm, affine, mlp
    exits.{E}.affine.weight      [D, D]  affine
    exits.{E}.mlp_norm.weight    [D]     mlp
    exits.{E}.gate_proj.weight   [F, D]  mlp
    exits.{E}.up_proj.weight     [F, D]  mlp
    exits.{E}.down_proj.weight   [D, F]  mlp

D is the model's hidden size and F its intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sortserve.checkpoint.loader import SafetensorsReader, check_tensors
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ExitModuleKind, ModelConfig
from sortserve.model.weights import ExitModuleWeights

__all__ = ["EXIT_MODULES", "exit_module_shapes", "load_exit_modules"]

EXIT_MODULES = "exit_modules.safetensors"


def exit_module_shapes(kind: ExitModuleKind, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of one exit module, without the ``exits.{E}.`` prefix."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    if kind is not ExitModuleKind.NONE:
        shapes["norm.weight"] = (hidden,)
    if kind is ExitModuleKind.AFFINE:
        shapes["affine.weight"] = (hidden, hidden)
    if kind is ExitModuleKind.MLP:
        shapes["mlp_norm.weight"] = (hidden,)
        shapes["gate_proj.weight"] = (intermediate, hidden)
        shapes["up_proj.weight"] = (intermediate, hidden)
        shapes["down_proj.weight"] = (hidden, intermediate)
    return shapes


def load_exit_modules(
    folder: Path,
    kinds: Mapping[int, ExitModuleKind],
    exits: Sequence[int],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[int, ExitModuleWeights]:
    """The modules of the served ``exits``; those of kind none have no entry.

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
    kinds = {layer: kind for layer, kind in kinds.items() if kind is not ExitModuleKind.NONE}
    path = folder / EXIT_MODULES
    if not kinds and not path.exists():
        return {}
    expected = {
        f"exits.{layer}.{name}": shape
        for layer, kind in kinds.items()
        for name, shape in exit_module_shapes(kind, config).items()
    }
    with SafetensorsReader([path], str(folder)) as reader:
        extra = sorted(set(reader.shapes) - set(expected))
        if extra:
            raise CheckpointError(
                f"{path}: tensor {extra[0]} belongs to no exit module that sorted.json names."
            )
        check_tensors(reader, expected)

        def read(layer: int, *names: str) -> Tensor:
            fused = torch.cat([reader.read(f"exits.{layer}.{name}.weight") for name in names])
            return fused.to(device=device, dtype=dtype)

        return {layer: _module(kinds[layer], layer, read) for layer in exits if layer in kinds}


def _module(kind: ExitModuleKind, layer: int, read: Callable[..., Tensor]) -> ExitModuleWeights:
    module = ExitModuleWeights(kind=kind, norm=read(layer, "norm"))
    if kind is ExitModuleKind.AFFINE:
        module.affine = read(layer, "affine")
    if kind is ExitModuleKind.MLP:
        module.mlp_norm = read(layer, "mlp_norm")
        module.gate_up = read(layer, "gate_proj", "up_proj")
        module.down = read(layer, "down_proj")
    return module
