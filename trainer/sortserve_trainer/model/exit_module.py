"""What every trainable exit module is: the twin of one served by ``sortserve.model.exit_module``.

Shape legend: T tokens of a packed row, R rows that the head reads, D hidden, H head_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS
from sortserve.model.weight import Weight

__all__ = ["NORM_NAMES", "ExitModule", "OwnNorm", "PackedRow", "SeenStates", "take_rows"]

NORM_NAMES = {"norm.weight": "model.norm.weight"}
"""Where an exit's own norm goes in a plain model."""


@dataclass(frozen=True)
class PackedRow:
    """What attention over a packed row must know of it beside the states."""

    position_embeddings: tuple[Tensor, Tensor]
    """Cosine and sine of every position, [1, T, H] each, as transformers makes them."""
    lengths: Sequence[int]
    """Tokens of each example, in order; what ``packed_attention`` takes."""


@dataclass(frozen=True)
class SeenStates:
    """One packed row that a module is shown before the first step."""

    row: PackedRow
    x_TD: Tensor
    """The residual stream at the module's exit."""
    before_last_TD: Tensor
    """The residual stream before the trunk's last layer."""
    full_TD: Tensor
    """The residual stream at full depth."""
    is_typical_T: Tensor
    """False at the first token of each example, whose states are outliers of another scale."""


class ExitModule(nn.Module):
    """One exit's module; maps the residual stream [T, D] to what the head reads.

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
    attends: ClassVar[bool] = False
    """Whether it reads the states of other tokens than those that the head reads."""
    plain_names: ClassVar[Mapping[str, str] | None] = None
    """For ``sortserve export``: its tensors' names in a plain model, where ``{E}`` is the index of
    a layer that is added; None where a plain model has no place for it."""
    plain_needs_mlp_bias: ClassVar[bool] = False
    """Whether the plain model has biases in its MLPs for it, zero in all other layers."""
    plain_has_head: ClassVar[bool] = False
    """Whether the head of the plain model is among its tensors, and so cannot be the embedding."""
    plain_max: ClassVar[float] = 0.0
    """What the numbers of the plain model must be able to hold for it."""
    export_note: ClassVar[str] = ""
    """What the card of an exported sub-model says of it."""
    export_obstacle: ClassVar[str] = "an exit module that"
    """What has no place in a plain model: the middle of a sentence."""

    @classmethod
    def has_plain_form(cls, config: ModelConfig) -> bool:
        """Whether a plain model of this architecture has a place for it."""
        return cls.plain_names is not None

    @classmethod
    def plain_tensors(
        cls, tensors: Mapping[str, Tensor], exit_layer: int, config: ModelConfig
    ) -> dict[str, Tensor]:
        """For ``sortserve export``: its tensors as those of a plain model, if that has a place.

        Args:
            tensors: by their names on disk.
            exit_layer: where it stands, and the index of the layer that is added for it.
            config: of the plain model.
        """
        assert cls.plain_names is not None
        return {
            cls.plain_names[name].format(E=exit_layer): tensor for name, tensor in tensors.items()
        }

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__()
        self.kind = kind
        for name, shape in EXIT_MODULE_KINDS[kind].shapes(config).items():
            self.register_parameter(_attribute(name), nn.Parameter(torch.zeros(shape)))

    def forward(self, x_TD: Tensor, row: PackedRow, rows: Tensor | None = None) -> Tensor:
        """The normed states that the shared head reads.

        Args:
            x_TD: the residual stream of a whole packed row.
            row: for those that attend.
            rows: which positions are read (bool [T] or int64 [R]); None is all.

        Returns:
            [R, D].
        """
        return self.read(take_rows(x_TD, rows))

    @abstractmethod
    def read(self, x_RD: Tensor) -> Tensor:
        """``forward`` of a kind whose tokens know nothing of one another."""

    def warm_start(
        self, seen: Sequence[SeenStates], last_layer: Mapping[str, Tensor], *, is_new: bool
    ) -> None:
        """Learn from the states at its exit, and if ``is_new`` start where they say.

        Args:
            seen: some thousand tokens.
            last_layer: the tensors of the trunk's last layer, LoRA merged, named as those of the
                kind ``layer``.
            is_new: whether it has not been trained.
        """

    @property
    def head(self) -> nn.Parameter | None:
        """[V, D]: what reads the normed states in place of the shared head."""
        return None

    def start_from_head(self, head_VD: Tensor) -> None:
        """What a new module that has a head of its own starts from: the shared one."""

    def quantize(self, quantize: Callable[[Tensor], Weight]) -> None:
        """For evaluation: compute with such weights wherever the server does."""

    def tensors(self) -> dict[str, Tensor]:
        """Its weights under their names on disk, without the ``exits.{E}.`` prefix."""
        return {_name(name): parameter.data for name, parameter in self.named_parameters()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights named as ``tensors`` names them."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.get_parameter(_attribute(name)).copy_(tensor)
        self.forget_casts()

    @staticmethod
    def forget_casts() -> None:
        """After weights change in place: autocast keeps what it has cast of the old ones."""
        torch.clear_autocast_cache()


def _attribute(name: str) -> str:
    """``gate_proj.weight`` as an attribute: a module's own names cannot hold a dot."""
    return name.replace(".", "_")


def _name(attribute: str) -> str:
    """The reverse."""
    stem, _, last = attribute.rpartition("_")
    return f"{stem}.{last}"


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """``x`` [T, ...] at ``rows`` (bool [T] or int64 [R]); None is all of it."""
    if rows is None:
        return x
    # By numbers nothing waits for a GPU, which has to count what is true.
    return x[rows] if rows.dtype is torch.bool else x.index_select(0, rows)


class OwnNorm(ExitModule):
    """An RMSNorm of its own, which starts as the model's final norm."""

    norm_weight: nn.Parameter

    plain_names: ClassVar[Mapping[str, str] | None] = NORM_NAMES
    export_note = "The exit's own norm is the final norm."

    def __init__(self, kind: str, config: ModelConfig, final_norm: Tensor) -> None:
        super().__init__(kind, config, final_norm)
        self.eps = config.rms_norm_eps
        self.shape = (config.hidden_size,)
        with torch.no_grad():
            self.norm_weight.copy_(final_norm)

    def read(self, x_RD: Tensor) -> Tensor:
        """See ExitModule."""
        return rms_norm(x_RD, self.shape, self.norm_weight.to(x_RD.dtype), self.eps)
