"""What stands between the trunk and the logits at an exit: one class per kind.

A kind is its name in ``EXIT_MODULE_KINDS``, the class there, and its twin of the same name in the
trainer. The class knows the kind's tensors and what they cost; an object of it is one exit's
module, built from its weights and run with the operations of the backend.

Importing this loads no torch, so that the command line can name the kinds.
Shape legend: R rows that sample, D hidden, F intermediate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from sortserve.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sortserve.model.backend import Backend

__all__ = [
    "EXIT_MODULE_KINDS",
    "HEAD",
    "NO_MODULE",
    "Affine",
    "ExitModule",
    "GatedMlp",
    "OwnHead",
    "OwnNorm",
    "SharedNorm",
    "WholeLayer",
    "exit_module_kind",
]

HEAD = "lm_head.weight"
"""What an exit's own head is called among its tensors."""


class ExitModule(ABC):
    """One exit's module; it ends in a norm: its own if it has one, else the model's final norm.

    Args:
        tensors: by their names in ``shapes``, on one device in one dtype.
        final_norm: [D], the model's.
        backend: what to compute with.
        eps: of the norms.
    """

    has_layer: ClassVar[bool] = False
    """Whether a decoder layer of the exit's own comes first: see ``sortserve.model.own_layer``."""
    has_head: ClassVar[bool] = False
    """Whether a head of the exit's own, ``HEAD``, comes last, in place of the model's."""

    def __init__(
        self, tensors: Mapping[str, Tensor], final_norm: Tensor, backend: Backend, eps: float
    ) -> None:
        self._norm = tensors.get("norm.weight", final_norm)
        self._ops = backend.ops
        self._eps = eps

    @classmethod
    @abstractmethod
    def shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Its tensors in ``exit_modules.safetensors``, without the ``exits.{E}.`` prefix."""

    @classmethod
    def num_parameters(cls, config: ModelConfig) -> int:
        """What a sub-model with it has beside layers, embedding and a head, whosever that is."""
        return sum(math.prod(shape) for name, shape in cls.shapes(config).items() if name != HEAD)

    @classmethod
    def num_matrix_elements(cls, config: ModelConfig) -> int:
        """Those of them that are multiplied with each token: half the FLOPs of a row, of which the
        head's are apart.
        """
        shapes = cls.shapes(config).items()
        return sum(math.prod(shape) for name, shape in shapes if len(shape) == 2 and name != HEAD)

    @classmethod
    def num_passing_elements(cls, config: ModelConfig) -> int:
        """Elements of matrices that tokens of deeper rows are multiplied with, too."""
        return 0

    def __call__(self, h_RD: Tensor) -> Tensor:
        """The residual stream to what the head reads, [R, D] both."""
        return self._ops.rms_norm(h_RD, self._norm, self._eps)


class SharedNorm(ExitModule):
    """The model's final norm, as in published SoFT."""

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See ExitModule."""
        return {}

    @classmethod
    def num_parameters(cls, config: ModelConfig) -> int:
        """The final norm's: a sub-model has it, too."""
        return config.hidden_size


class OwnNorm(ExitModule):
    """An RMSNorm of its own."""

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See ExitModule."""
        return {"norm.weight": (config.hidden_size,)}


class Affine(OwnNorm):
    """``x + W x``, then its own norm."""

    def __init__(
        self, tensors: Mapping[str, Tensor], final_norm: Tensor, backend: Backend, eps: float
    ) -> None:
        from sortserve.model.weight import Weight

        super().__init__(tensors, final_norm, backend, eps)
        self._affine = backend.linear(Weight.plain(tensors["affine.weight"]))

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See ExitModule."""
        return {**super().shapes(config), "affine.weight": (config.hidden_size,) * 2}

    def __call__(self, h_RD: Tensor) -> Tensor:
        """See ExitModule."""
        return super().__call__(h_RD + self._affine(h_RD))


class GatedMlp(OwnNorm):
    """``x + down(silu(gate(n(x))) * up(n(x)))``, n a second RMSNorm, then its own norm."""

    def __init__(
        self, tensors: Mapping[str, Tensor], final_norm: Tensor, backend: Backend, eps: float
    ) -> None:
        import torch

        from sortserve.model.weight import Weight

        super().__init__(tensors, final_norm, backend, eps)
        self._mlp_norm = tensors["mlp_norm.weight"]
        gate_up = torch.cat((tensors["gate_proj.weight"], tensors["up_proj.weight"]))
        self._gated = backend.gated(Weight.plain(gate_up))
        self._down = backend.linear(Weight.plain(tensors["down_proj.weight"]))

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See ExitModule."""
        hidden, intermediate = config.hidden_size, config.intermediate_size
        return {
            **super().shapes(config),
            "mlp_norm.weight": (hidden,),
            "gate_proj.weight": (intermediate, hidden),
            "up_proj.weight": (intermediate, hidden),
            "down_proj.weight": (hidden, intermediate),
        }

    def __call__(self, h_RD: Tensor) -> Tensor:
        """See ExitModule."""
        x_RD = self._ops.rms_norm(h_RD, self._mlp_norm, self._eps)
        return super().__call__(h_RD + self._down(self._gated(x_RD)))


class WholeLayer(OwnNorm):
    """One more decoder layer of the model, then its own norm.

    Its keys and values are of all tokens that pass the exit, wherever their rows leave: so none is
    missing when a row goes shallower. Called, it is the norm alone; ``OwnLayer`` is the layer.
    """

    has_layer = True

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See ExitModule; biases and norms of heads are where the model's layers have them."""
        hidden, intermediate = config.hidden_size, config.intermediate_size
        matrices = {
            "q_proj": (config.q_size, hidden, config.qkv_bias),
            "k_proj": (config.kv_size, hidden, config.qkv_bias),
            "v_proj": (config.kv_size, hidden, config.qkv_bias),
            "o_proj": (hidden, config.q_size, config.o_bias),
            "gate_proj": (intermediate, hidden, config.mlp_bias),
            "up_proj": (intermediate, hidden, config.mlp_bias),
            "down_proj": (hidden, intermediate, config.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {
            **super().shapes(config),
            "attn_norm.weight": (hidden,),
            "mlp_norm.weight": (hidden,),
        }
        for name, (outputs, inputs, has_bias) in matrices.items():
            shapes[f"{name}.weight"] = (outputs, inputs)
            if has_bias:
                shapes[f"{name}.bias"] = (outputs,)
        if config.qk_norm:
            shapes |= dict.fromkeys(("q_norm.weight", "k_norm.weight"), (config.head_dim,))
        return shapes

    @classmethod
    def num_passing_elements(cls, config: ModelConfig) -> int:
        """Those of the keys and values."""
        return 2 * config.kv_size * config.hidden_size


class OwnHead(OwnNorm):
    """Its own norm, and an output matrix of its own in place of the model's head.

    It costs what the shared head costs, and the memory of one head more. Called, it is the norm
    alone: ``Decoder.logits`` has the heads, since the rows of one head pass it together.
    """

    has_head = True

    @classmethod
    def shapes(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See ExitModule."""
        return {**super().shapes(config), HEAD: (config.vocab_size, config.hidden_size)}


NO_MODULE = "none"
"""The kind of every exit that ``sorted.json`` names none for."""

EXIT_MODULE_KINDS: dict[str, type[ExitModule]] = {
    NO_MODULE: SharedNorm,
    "norm": OwnNorm,
    "affine": Affine,
    "mlp": GatedMlp,
    "layer": WholeLayer,
    "head": OwnHead,
}
"""By the names of ``sorted.json`` and ``--exit-modules``."""


def exit_module_kind(name: object) -> str:
    """``name``, if it is a kind's.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(name, str) or name not in EXIT_MODULE_KINDS:
        *names, last = map(repr, EXIT_MODULE_KINDS)
        raise ValueError(f"it should be {', '.join(names)} or {last}")
    return name
