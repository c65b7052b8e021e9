"""Trainable exit modules: the twin of each kind in ``sortserve.model.exit_module``.

Twins have the same name in ``TRAINED_EXIT_MODULES`` as there, the same tensors on disk, and compute
the same function.

Shape legend: T tokens, D hidden, F intermediate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS
from sortserve_trainer.model.moments import Moments

__all__ = ["TRAINED_EXIT_MODULES", "Affine", "ExitModule", "ExitModules", "GatedMlp", "OwnNorm"]


class ExitModule(nn.Module):
    """One exit's module; maps the residual stream [T, D] to what the head reads [T, D].

    Its parameters are the tensors of the served module, ``gate_proj.weight`` as
    ``gate_proj_weight``, and zero until a kind's ``__init__`` fills them: with the identity before
    the model's final norm, so that a new module changes nothing.

    Args:
        kind: its name in the tables.
        config: gives the shapes.
        final_norm: [D], the model's.
    """

    reads_states: ClassVar[bool] = False
    """Whether ``warm_start`` is called before the first step."""
    plain_names: ClassVar[Mapping[str, str] | None] = None
    """For ``sortserve export``: its tensors' names in a plain model, where ``{E}`` is the index of
    a layer that is added; None where a plain model has no place for it."""
    export_note: ClassVar[str] = ""
    """What the card of an exported sub-model says of it."""
    export_obstacle: ClassVar[str] = "an exit module that"
    """What has no place in a plain model: the middle of a sentence."""

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__()
        self.kind = kind
        for name, shape in EXIT_MODULE_KINDS[kind].shapes(config).items():
            self.register_parameter(_attribute(name), nn.Parameter(torch.zeros(shape)))

    @abstractmethod
    def forward(self, x_TD: Tensor) -> Tensor:
        """The normed state that the shared head reads."""

    def warm_start(self, moments: Moments, *, is_new: bool) -> None:
        """Learn from the states at its exit, and if ``is_new`` start where they say."""

    def tensors(self) -> dict[str, Tensor]:
        """Its weights under their names on disk, without the ``exits.{E}.`` prefix."""
        return {
            name.replace("_weight", ".weight"): parameter.data
            for name, parameter in self.named_parameters()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights named as ``tensors`` names them."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.get_parameter(_attribute(name)).copy_(tensor)


def _attribute(name: str) -> str:
    """``gate_proj.weight`` as an attribute: a module's own names cannot hold a dot."""
    return name.replace(".", "_")


_NORM = {"norm.weight": "model.norm.weight"}


class OwnNorm(ExitModule):
    """An RMSNorm of its own, which starts as the model's final norm."""

    norm_weight: nn.Parameter

    plain_names: ClassVar[Mapping[str, str] | None] = _NORM
    export_note = "The exit's own norm is the final norm."

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__(kind, config, final_norm)
        self.eps = config.rms_norm_eps
        self.shape = (config.hidden_size,)
        with torch.no_grad():
            self.norm_weight.copy_(final_norm)

    def forward(self, x_TD: Tensor) -> Tensor:
        """See ExitModule."""
        return rms_norm(x_TD, self.shape, self.norm_weight.to(x_TD.dtype), self.eps)


class Affine(OwnNorm):
    """``x + W x``, then its own norm.

    A new one starts where least squares puts it: its exit's state is mapped to the full depth's by
    ridge regression, ``x + W x ~ c h_L / rms(h_L)``. The scale c does not matter to the RMSNorm
    that follows; it is chosen so that W need not undo x, which would cost bf16 its digits. On
    SmolLM2-135M this takes the loss of exit 24 of 30 from 11.9 to under 4.1 nats in seconds, where
    gradient steps need some hundred thousand tokens (docs/training.md).

    The residual stream has a few dimensions of hundreds of times the size of the others, and a
    step of Adam on their columns of ``W`` would move the output by as much. So what is trained is
    ``U = W diag(s)``, s the typical size of each dimension (``input_scale``); on disk there is only
    W.
    """

    affine_weight: nn.Parameter
    input_scale: Tensor

    reads_states = True
    plain_names = None
    export_obstacle = "an affine module, and a linear map between the last layer and the norm"

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__(kind, config, final_norm)
        self.register_buffer("input_scale", torch.ones(config.hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """See ExitModule."""
        return super().forward(x_TD + linear(x_TD, self.affine_weight / self.input_scale))

    def warm_start(self, moments: Moments, *, is_new: bool) -> None:
        """See ExitModule."""
        size_D = moments.sizes()
        typical = size_D.median()
        with torch.no_grad():
            scale_D = (size_D / typical).to(self.input_scale.dtype)
            self.affine_weight.mul_(scale_D / self.input_scale)  # W stays what it was
            self.input_scale.copy_(scale_D)
            if is_new:
                identity = torch.eye(len(size_D)).to(size_D)
                self.affine_weight.copy_((typical * moments.fit() - identity) * scale_D)

    def tensors(self) -> dict[str, Tensor]:
        """See ExitModule."""
        named = super().tensors()
        return {**named, "affine.weight": named["affine.weight"] / self.input_scale}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See ExitModule."""
        super().load(tensors)
        with torch.no_grad():
            self.affine_weight.mul_(self.input_scale)


class GatedMlp(OwnNorm):
    """``x + down(silu(gate(n(x))) * up(n(x)))``, n a second RMSNorm, then its own norm.

    Exported, it is one more layer whose attention adds nothing (its output projection is zero).
    """

    mlp_norm_weight: nn.Parameter
    gate_proj_weight: nn.Parameter
    up_proj_weight: nn.Parameter
    down_proj_weight: nn.Parameter

    plain_names: ClassVar[Mapping[str, str] | None] = {
        **_NORM,
        "mlp_norm.weight": "model.layers.{E}.post_attention_layernorm.weight",
        "gate_proj.weight": "model.layers.{E}.mlp.gate_proj.weight",
        "up_proj.weight": "model.layers.{E}.mlp.up_proj.weight",
        "down_proj.weight": "model.layers.{E}.mlp.down_proj.weight",
    }
    export_note = "The last layer is the exit's MLP module: its attention is zero by construction."

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__(kind, config, final_norm)
        with torch.no_grad():
            self.mlp_norm_weight.fill_(1.0)
            for weight in (self.gate_proj_weight, self.up_proj_weight):
                nn.init.normal_(weight, std=config.hidden_size**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """See ExitModule."""
        n_TD = rms_norm(x_TD, self.shape, self.mlp_norm_weight.to(x_TD.dtype), self.eps)
        gate_TF = silu(linear(n_TD, self.gate_proj_weight))
        delta_TD = linear(gate_TF * linear(n_TD, self.up_proj_weight), self.down_proj_weight)
        return super().forward(x_TD + delta_TD)


TRAINED_EXIT_MODULES: dict[str, type[ExitModule]] = {
    "norm": OwnNorm,
    "affine": Affine,
    "mlp": GatedMlp,
}
"""By the names of ``EXIT_MODULE_KINDS``; a kind without tensors has nothing to train."""


class ExitModules(nn.ModuleDict):
    """The modules of all exits below full depth that have one, by exit layer as a string."""

    def __init__(self, kinds: Mapping[int, str], config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__(
            {
                str(exit_layer): TRAINED_EXIT_MODULES[kind](kind, config, final_norm)
                for exit_layer, kind in sorted(kinds.items())
                if EXIT_MODULE_KINDS[kind].shapes(config)
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

    def kinds(self, exits: Sequence[int]) -> dict[int, str]:
        """The name of the kind at each of ``exits`` that has one."""
        return {e: module.kind for e, module in self.by_exit.items() if e in exits}
