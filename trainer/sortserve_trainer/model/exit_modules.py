"""Trainable exit modules, under the names of ``exit_modules.safetensors`` (design 3).

    x = x + W x                                   affine
    x = x + down(silu(gate(n(x))) * up(n(x)))     mlp, n its own RMSNorm
    x = norm(x)                                   norm, affine and mlp: an own norm

Shape legend: T tokens, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from sortserve.checkpoint.exit_modules import exit_module_shapes
from sortserve.model.config import ExitModuleKind, ModelConfig

__all__ = ["ExitModule", "ExitModules"]


class ExitModule(nn.Module):
    """One exit's module; maps the residual stream [T, D] to what the head reads [T, D].

    Starts as the identity before the model's final norm: ``affine`` and ``down_proj`` are zero.

    The residual stream has a few dimensions of hundreds of times the size of the others, and a
    step of Adam on their columns of ``W`` would move the output by as much. So what is trained is
    ``U = W diag(s)``, s the typical size of each dimension (``input_scale``, set by
    ``warm_start``); on disk there is only W.
    """

    norm_weight: nn.Parameter
    affine_weight: nn.Parameter
    mlp_norm_weight: nn.Parameter
    gate_proj_weight: nn.Parameter
    up_proj_weight: nn.Parameter
    down_proj_weight: nn.Parameter
    input_scale: Tensor

    def __init__(self, kind: ExitModuleKind, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.eps = config.rms_norm_eps
        self.shape = (config.hidden_size,)
        for name, shape in exit_module_shapes(kind, config).items():
            self.register_parameter(_attribute(name), nn.Parameter(torch.zeros(shape)))
        if kind is ExitModuleKind.AFFINE:
            self.register_buffer("input_scale", torch.ones(config.hidden_size))
        with torch.no_grad():
            if kind is not ExitModuleKind.NONE:
                self.norm_weight.copy_(final_norm)
            if kind is ExitModuleKind.MLP:
                self.mlp_norm_weight.fill_(1.0)
                for weight in (self.gate_proj_weight, self.up_proj_weight):
                    nn.init.normal_(weight, std=config.hidden_size**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The normed state that the shared head reads."""
        if self.kind is ExitModuleKind.AFFINE:
            x_TD = x_TD + linear(x_TD, self.affine_weight / self.input_scale)
        if self.kind is ExitModuleKind.MLP:
            n_TD = rms_norm(x_TD, self.shape, self.mlp_norm_weight.to(x_TD.dtype), self.eps)
            gate_TF = silu(linear(n_TD, self.gate_proj_weight))
            x_TD = x_TD + linear(gate_TF * linear(n_TD, self.up_proj_weight), self.down_proj_weight)
        return rms_norm(x_TD, self.shape, self.norm_weight.to(x_TD.dtype), self.eps)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights under their names on disk, without the ``exits.{E}.`` prefix."""
        named = {name: parameter.data for name, parameter in self.named_parameters()}
        if self.kind is ExitModuleKind.AFFINE:
            named["affine_weight"] = named["affine_weight"] / self.input_scale
        return {name.replace("_weight", ".weight"): tensor for name, tensor in named.items()}

    def rescale(self, input_scale: Tensor) -> None:
        """Change ``s`` and keep ``W``: the function stays the same, its training does not."""
        with torch.no_grad():
            self.affine_weight.mul_(input_scale / self.input_scale)
            self.input_scale.copy_(input_scale)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights named as ``tensors`` names them."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.get_parameter(_attribute(name)).copy_(tensor)
            if self.kind is ExitModuleKind.AFFINE:
                self.affine_weight.mul_(self.input_scale)


def _attribute(name: str) -> str:
    """``gate_proj.weight`` as an attribute: a module's own names cannot hold a dot."""
    return name.replace(".", "_")


class ExitModules(nn.ModuleDict):
    """The modules of all exits below full depth that have one, by exit layer as a string."""

    def __init__(
        self,
        kinds: Mapping[int, ExitModuleKind],
        config: ModelConfig,
        final_norm: Tensor,
    ) -> None:
        super().__init__(
            {
                str(exit_layer): ExitModule(kind, config, final_norm)
                for exit_layer, kind in sorted(kinds.items())
                if kind is not ExitModuleKind.NONE
            }
        )

    @property
    def by_exit(self) -> dict[int, ExitModule]:
        """Exit layer to module, ascending."""
        return {int(name): cast(ExitModule, module) for name, module in self.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All weights under their names in ``exit_modules.safetensors``."""
        return {
            f"exits.{exit_layer}.{name}": tensor
            for exit_layer, module in self.by_exit.items()
            for name, tensor in module.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of an ``exit_modules.safetensors``."""
        for exit_layer, module in self.by_exit.items():
            prefix = f"exits.{exit_layer}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            module.load(own)

    def kinds(self, exits: Sequence[int]) -> dict[int, ExitModuleKind]:
        """The kind at each of ``exits`` that has one."""
        return {e: module.kind for e, module in self.by_exit.items() if e in exits}
