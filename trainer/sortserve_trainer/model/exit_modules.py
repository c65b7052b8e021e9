"""Trainable exit modules: the twin of each kind in ``sortserve.model.exit_module``.

Twins have the same name in ``TRAINED_EXIT_MODULES`` as there, the same tensors on disk, and compute
the same function.

Shape legend: T tokens, R rows that the head reads, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm, silu

from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS, HEAD
from sortserve_trainer.model.exit_module import NORM_NAMES, ExitModule, OwnNorm, SeenStates
from sortserve_trainer.model.moments import Moments
from sortserve_trainer.model.whole_layer import WholeLayer

__all__ = [
    "TRAINED_EXIT_MODULES",
    "Affine",
    "ExitModule",
    "ExitModules",
    "GatedMlp",
    "OwnHead",
    "OwnNorm",
]

_MAGNITUDE = 2.0**24
"""Of an exported linear map: so large that the residual stream beside it is rounding, and squares
of its sums are far from the end of float32 and bfloat16."""


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
    plain_needs_mlp_bias = True
    plain_max = _MAGNITUDE
    export_note = "The last layer is the exit's linear map: its attention is zero, its gate is one."
    export_obstacle = "an affine module, and a linear map between the last layer and the norm"

    @classmethod
    def has_plain_form(cls, config: ModelConfig) -> bool:
        """See ExitModule; in the other families an MLP has no bias."""
        return config.family == "llama" and config.intermediate_size >= config.hidden_size

    @classmethod
    def plain_tensors(
        cls, tensors: Mapping[str, Tensor], exit_layer: int, config: ModelConfig
    ) -> dict[str, Tensor]:
        """See ExitModule; a layer without attention whose MLP is linear.

        With a gate that is a bias alone, the MLP adds ``c (n + W n)`` to ``x``, n = x / rms(x). So
        the sum is ``(c + rms(x)) n + c W n``, and the norm behind it, to which its length is
        nothing, finds ``x + W x`` but for a share of rms(x) / c of ``W x``.
        """
        assert cls.has_plain_form(config)
        hidden, intermediate = config.hidden_size, config.intermediate_size
        affine_DD = tensors["affine.weight"].double() + torch.eye(hidden, dtype=torch.float64)
        rest = intermediate - hidden
        mlp = f"model.layers.{exit_layer}.mlp."
        return {
            "model.norm.weight": tensors["norm.weight"],
            f"{mlp}gate_proj.bias": torch.ones(intermediate),
            f"{mlp}up_proj.weight": pad(torch.eye(hidden), (0, 0, 0, rest)),
            f"{mlp}down_proj.weight": pad((_MAGNITUDE * affine_DD).float(), (0, rest)),
        }

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__(kind, config, final_norm)
        self.register_buffer("input_scale", torch.ones(config.hidden_size))

    def read(self, x_RD: Tensor) -> Tensor:
        """See ExitModule."""
        return super().read(x_RD + linear(x_RD, self.affine_weight / self.input_scale))

    def warm_start(
        self, seen: Sequence[SeenStates], last_layer: Mapping[str, Tensor], *, is_new: bool
    ) -> None:
        """See ExitModule."""
        moments = _affine_moments(seen)
        size_D = moments.sizes()
        typical = size_D.median()
        with torch.no_grad():
            scale_D = (size_D / typical).to(self.input_scale.dtype)
            self.affine_weight.mul_(scale_D / self.input_scale)  # W stays what it was
            self.input_scale.copy_(scale_D)
            if is_new:
                identity = torch.eye(len(size_D)).to(size_D)
                self.affine_weight.copy_((typical * moments.fit() - identity) * scale_D)
        self.forget_casts()

    def tensors(self) -> dict[str, Tensor]:
        """See ExitModule."""
        named = super().tensors()
        return {**named, "affine.weight": named["affine.weight"] / self.input_scale}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See ExitModule."""
        super().load(tensors)
        with torch.no_grad():
            self.affine_weight.mul_(self.input_scale)
        self.forget_casts()


def _affine_moments(seen: Sequence[SeenStates]) -> Moments:
    moments = Moments()
    for states in seen:
        y_TD = states.full_TD[states.is_typical_T].double()
        y_TD = y_TD * y_TD.square().mean(-1, keepdim=True).rsqrt()
        moments.add(states.x_TD[states.is_typical_T], y_TD)
    return moments


class GatedMlp(OwnNorm):
    """``x + down(silu(gate(n(x))) * up(n(x)))``, n a second RMSNorm, then its own norm.

    Exported, it is one more layer whose attention adds nothing (its output projection is zero).
    """

    mlp_norm_weight: nn.Parameter
    gate_proj_weight: nn.Parameter
    up_proj_weight: nn.Parameter
    down_proj_weight: nn.Parameter

    plain_names: ClassVar[Mapping[str, str] | None] = {
        **NORM_NAMES,
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

    def read(self, x_RD: Tensor) -> Tensor:
        """See ExitModule."""
        n_RD = rms_norm(x_RD, self.shape, self.mlp_norm_weight.to(x_RD.dtype), self.eps)
        gate_RF = silu(linear(n_RD, self.gate_proj_weight))
        delta_RD = linear(gate_RF * linear(n_RD, self.up_proj_weight), self.down_proj_weight)
        return super().read(x_RD + delta_RD)


class OwnHead(OwnNorm):
    """Its own norm and a head of its own: as a plain model, that model's head."""

    lm_head_weight: nn.Parameter

    plain_names: ClassVar[Mapping[str, str] | None] = {**NORM_NAMES, HEAD: HEAD}
    plain_has_head = True
    export_note = "The exit's own norm is the final norm, its own head is the head."

    @property
    def head(self) -> nn.Parameter:
        """See ExitModule."""
        return self.lm_head_weight

    def start_from_head(self, head_VD: Tensor) -> None:
        """See ExitModule."""
        with torch.no_grad():
            self.lm_head_weight.copy_(head_VD)


TRAINED_EXIT_MODULES: dict[str, type[ExitModule]] = {
    "norm": OwnNorm,
    "affine": Affine,
    "mlp": GatedMlp,
    "layer": WholeLayer,
    "head": OwnHead,
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

    def attends(self, exit_layer: int) -> bool:
        """Whether what an exit says of a token depends on those before it at the same depth."""
        module = self.by_exit.get(exit_layer)
        return module is not None and module.attends

    def tensors(self) -> dict[str, Tensor]:
        """All weights under their names in ``exit_modules.safetensors``."""
        return {
            f"exits.{exit_layer}.{name}": tensor
            for exit_layer, module in self.by_exit.items()
            for name, tensor in module.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor], exits: Iterable[int]) -> None:
        """Take the weights of an ``exit_modules.safetensors`` at some exits that have a module."""
        for exit_layer in exits:
            prefix = f"exits.{exit_layer}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            self.by_exit[exit_layer].load(own)

    def replace(
        self, exit_layer: int, kind: str, config: ModelConfig, final_norm: Tensor
    ) -> ExitModule:
        """A new module in place of the one that an exit has or has not."""
        module = TRAINED_EXIT_MODULES[kind](kind, config, final_norm)
        self[str(exit_layer)] = module
        return module

    def kinds(self, exits: Sequence[int]) -> dict[int, str]:
        """The name of the kind at each of ``exits`` that has one."""
        return {e: module.kind for e, module in self.by_exit.items() if e in exits}
