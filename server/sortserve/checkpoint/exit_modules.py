"""``exit_modules.safetensors``: the weights of what stands between trunk and head at each exit.

The tensors of exit E are named ``exits.{E}.NAME``; names and shapes are those of its kind
(``ExitModule.shapes``), listed in checkpoints/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sortserve.checkpoint.loader import check_tensors
from sortserve.checkpoint.shards import shard
from sortserve.checkpoint.tensors import SafetensorsReader
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS, HEAD
from sortserve.model.local_shape import LocalShape
from sortserve.model.weight import Weight
from sortserve.model.weights import ExitModuleWeights, OwnLayerWeights

__all__ = ["EXIT_MODULES", "load_exit_modules"]

EXIT_MODULES = "exit_modules.safetensors"


def load_exit_modules(
    folder: Path,
    kinds: Mapping[int, str],
    exits: Sequence[int],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Callable[[Tensor], Weight] = Weight.plain,
    shape: LocalShape | None = None,
) -> dict[int, ExitModuleWeights]:
    """The modules of the served ``exits``; those without tensors have no entry.

    Args:
        folder: where ``exit_modules.safetensors`` lies.
        kinds: all modules ``sorted.json`` names; the file must hold just these.
        exits: the exits to be served, a part of the checkpoint's or others.
        config: gives the shapes.
        dtype: of the result.
        device: of the result.
        quantize: makes the weights of the matrices of exits' own layers and heads, as of the
            trunk's.
        shape: the share of exits' own layers and heads to load; None: everything. Of all else a
            rank has the whole.

    Raises:
        CheckpointError: the file is missing or truncated, or a tensor is missing, of another
            shape, or of no module that ``sorted.json`` names.
    """
    shapes = {layer: EXIT_MODULE_KINDS[name].shapes(config) for layer, name in kinds.items()}
    if config.output_norms and any(EXIT_MODULE_KINDS[name].has_layer for name in kinds.values()):
        raise CheckpointError(
            f"{folder}: exit modules of kind 'layer' are not supported for models of family "
            f"{config.family!r}."
        )
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

        def fuse_shares(layer: int, *names: str) -> Tensor:
            wholes = {name: reader.read(f"exits.{layer}.{name}") for name in names}
            shares = [
                whole if shape is None else shard(name, whole, config, shape)
                for name, whole in wholes.items()
            ]
            # A copy, even of a single tensor.
            return torch.cat(shares).to(device=device, dtype=dtype)

        def own_layer(layer: int) -> OwnLayerWeights:
            def fuse(*names: str) -> Tensor:
                return fuse_shares(layer, *names)

            def matrix(*names: str) -> Weight:
                return quantize(fuse(*(f"{name}.weight" for name in names)))

            def vector(*names: str) -> Tensor | None:
                return fuse(*names) if shapes[layer].keys() >= set(names) else None

            return OwnLayerWeights(
                input_norm=fuse("attn_norm.weight"),
                q=matrix("q_proj"),
                q_bias=vector("q_proj.bias"),
                kv=matrix("k_proj", "v_proj"),
                kv_bias=vector("k_proj.bias", "v_proj.bias"),
                q_norm=vector("q_norm.weight"),
                k_norm=vector("k_norm.weight"),
                o=matrix("o_proj"),
                o_bias=vector("o_proj.bias"),
                post_attention_norm=fuse("mlp_norm.weight"),
                gate_up=matrix("gate_proj", "up_proj"),
                gate_up_bias=vector("gate_proj.bias", "up_proj.bias"),
                down=matrix("down_proj"),
                down_bias=vector("down_proj.bias"),
            )

        def module(layer: int) -> ExitModuleWeights:
            kind = EXIT_MODULE_KINDS[kinds[layer]]
            own = {"norm.weight"} if kind.has_layer else shapes[layer].keys() - {HEAD}
            return ExitModuleWeights(
                kind=kind,
                tensors={name: read(layer, name) for name in own},
                layer=own_layer(layer) if kind.has_layer else None,
                head=quantize(fuse_shares(layer, HEAD)) if kind.has_head else None,
            )

        return {layer: module(layer) for layer in exits if shapes.get(layer)}
